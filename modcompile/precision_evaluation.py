"""What a model of several precisions scores on a text, and at how many bits: fixed, routed, statically allocated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.open_gates import open_gates
from modcompile.precision_sensitivity import measure_block_sensitivity
from modcompile.precision_usage import PrecisionUsage, mean_bits
from modcompile.static_allocation import Allocation, Sensitivity, allocation_at, greedy_allocations
from modcompile.text_loss import TextLoss, batches, count_predicted_tokens, summed_loss
from modcompile.tracing import eval_mode


@dataclass(frozen=True)
class PrecisionMeasurement(TextLoss):
    """The model on a text, one sequence a call."""

    shares: tuple[dict[int, float], ...]
    """For each block, which share of the tokens it computed with how many bits; padding counts nowhere."""

    @property
    def average_bits(self) -> float:
        """The mean over tokens and blocks."""
        return sum(self.average_bits_per_block) / len(self.shares)

    @property
    def average_bits_per_block(self) -> list[float]:
        """The mean over tokens."""
        return [mean_bits(by_bits) for by_bits in self.shares]


@dataclass(frozen=True)
class PrecisionEvaluation:
    """A model on a text: its routers, and what they are to beat."""

    fixed: dict[int, PrecisionMeasurement]
    """All blocks at one precision, for each of them, the lowest first; depth gates are open."""
    router: PrecisionMeasurement
    """Each block at the precision that its router picks, or skipped by its depth gate."""
    static: dict[Allocation, PrecisionMeasurement]
    """Each block at bits of its own, the same for all inputs, depth gates open; the fewest bits in all first."""
    at_router: Allocation | None
    """The one of them with the most bits that the routers' average allows; None if they use fewer than any has."""
    sensitivity: Sensitivity
    """What the static allocations were chosen by, in nats a token; measured on another text."""
    trained: bool
    """Whether what a router picks depends on the input."""
    sequences: int
    predicted_tokens: int

    @property
    def caveats(self) -> list[str]:
        """What keeps the routers from being compared with the rest."""
        untrained = [] if self.trained else ["choice of bits untrained"]
        return untrained if self.at_router is not None else [*untrained, "fewer bits than any static allocation"]


def evaluate_precisions(
    model: LayerwiseQuantizeForCausalLM, blocks: Dataset, calibration_blocks: Dataset, *, static_points: int = 3
) -> PrecisionEvaluation:
    """Measure `model` on `blocks`, both as `tokenize_and_pack` makes them; afterwards its routers decide.

    The routers' row has the model's depth gates, if it has some; all others have them open, so that bits are spent.

    Static allocations are chosen by `measure_block_sensitivity` on `calibration_blocks`, and measured at the averages
    of the routers and of every precision, and at `static_points` more, spaced evenly from the lowest to the highest.

    Raises:
        DataError: there is no token to predict, or one that the model does not have.
    """
    predicted = count_predicted_tokens(blocks, model.config.vocab_size)
    count_predicted_tokens(calibration_blocks, model.config.vocab_size)  # refused before minutes of work
    lowest, highest = model.precisions[0], model.precisions[-1]
    with _routers_decide_again(model), eval_mode(model):
        with _bar("Evaluating precisions", len(model.precisions) + 1, blocks) as bar:
            with open_gates(model):
                fixed = {bits: measure_precisions(model, bits, blocks, predicted, bar) for bits in model.precisions}
            router = measure_precisions(model, None, blocks, predicted, bar)
        num_blocks = len(router.shares)
        sensitivity = measure_block_sensitivity(model, num_blocks, calibration_blocks)
        allocations = greedy_allocations(sensitivity)
        step = (highest - lowest) / (static_points + 1)
        averages = [*model.precisions, *(lowest + step * index for index in range(1, static_points + 1))]
        at_router, *others = (allocation_at(allocations, average) for average in (router.average_bits, *averages))
        chosen = {bits for bits in (at_router, *others) if bits is not None}
        known = {(bits,) * num_blocks: measured for bits, measured in fixed.items()}
        with open_gates(model), _bar("Evaluating static allocations", len(chosen - known.keys()), blocks) as bar:
            static = {
                bits: known.get(bits) or measure_precisions(model, bits, blocks, predicted, bar)
                for bits in sorted(chosen, key=sum)
            }
    trained = any(each.reads_input for each in model.routers.values())
    return PrecisionEvaluation(fixed, router, static, at_router, sensitivity, trained, blocks.num_rows, predicted)


@torch.no_grad()
def measure_precisions(
    model: LayerwiseQuantizeForCausalLM,
    num_bits: int | Sequence[int] | None,
    blocks: Dataset,
    predicted: int,
    bar: "tqdm[Any]",
) -> PrecisionMeasurement:
    """All blocks at so many bits, or each at its own, or (None) as their routers choose; these bits stay fixed.

    `predicted` tokens of `blocks` are to be predicted (`count_predicted_tokens`).
    """
    model.fix_precision(num_bits)
    loss, usage = 0.0, PrecisionUsage()
    # One sequence a call: of several, all are computed with the most bits that one of them chose.
    for batch in batches(blocks, 1, model.device):
        output = model.infer_forward(batch["input_ids"], batch["attention_mask"], use_cache=False)
        assert output.logits is not None and output.num_bits is not None and output.tokens is not None
        loss += summed_loss(output.logits, batch["labels"])
        usage.update(output.num_bits, output.tokens)
        bar.update()
    return PrecisionMeasurement(loss / predicted, usage.shares)


def _bar(description: str, measurements: int, blocks: Dataset) -> "tqdm[Any]":
    return tqdm(total=measurements * blocks.num_rows, desc=description, unit="sequence", delay=2, leave=False)


@contextmanager
def _routers_decide_again(model: LayerwiseQuantizeForCausalLM) -> Iterator[None]:
    try:
        yield
    finally:
        model.fix_precision(None)
