"""Tell rounding from mistakes: how far both runtimes are from the same graph in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from modcompile.export.paired_steps import PairedStep, largest, paired_steps
from modcompile.export.session import RoutedSession
from modcompile.export.subject import Subject
from modcompile.export.verification_inputs import Case
from modcompile.modeling import RoutedForCausalLM
from modcompile.passes.retarget_dtype import retarget_dtype


def errors_to_double(
    subject: Subject, model: RoutedForCausalLM, session: RoutedSession, cases: Sequence[Case]
) -> dict[str, dict[str, float]]:
    """For each case the largest error of a logit in PyTorch and in ONNX Runtime, both in float32, against float64.

    A routing that the model was not trained for can make it amplify rounding errors until two sound runtimes differ by
    more than any bound. `model` is what `subject` runs. Compared are tokens up to the first route of their row that is
    another in float64.
    """
    # In float32 first: what float64 is to be compared with.
    single = [[step.torch_logits for step in _steps(subject, session, case)] for case in cases]
    errors: dict[str, dict[str, float]] = {}
    with _in_double(model):
        for case, in_single in zip(cases, single, strict=True):
            worst = errors.setdefault(case.name, {"torch": 0.0, "onnx": 0.0})
            same = np.ones(len(case.prefills), bool)
            for step, torch_logits in zip(_steps(subject, session, case), in_single, strict=True):
                same &= ((step.torch_routes == step.onnx_routes) | ~step.tokens).all((0, 2))
                valid = step.tokens & same[:, None]
                for name, logits in (("torch", torch_logits), ("onnx", step.onnx_logits)):
                    worst[name] = max(worst[name], largest((logits - step.torch_logits)[valid]))
    subject.restore()
    return errors


def _steps(subject: Subject, session: RoutedSession, case: Case) -> Iterator[PairedStep]:
    subject.force(session, case)
    return paired_steps(subject, session, case)


@contextmanager
def _in_double(model: RoutedForCausalLM) -> Iterator[None]:
    """The model in float64; afterwards it is what it was, to the last bit, as every float32 is a float64."""
    model.double()
    retarget_dtype(model.graph, torch.float32, torch.float64)
    try:
        yield
    finally:
        model.float()
