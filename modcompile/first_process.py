"""What one of several processes that train together does for all: reading is for each, writing for the first."""

from collections.abc import Callable

from transformers import TrainingArguments


def in_first_process(training: TrainingArguments, act: Callable[[], object]) -> None:
    """Call `act` in the first process; the others wait until it is done. A training of one process has the first only.

    What it raises ends the first process, and the launcher (torchrun, accelerate) the others.
    """
    with training.main_process_first(local=False):
        if training.process_index == 0:
            act()
