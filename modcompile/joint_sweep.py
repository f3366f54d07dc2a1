"""Depth and precision together: what is lost at how many bytes of weights a token."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from tqdm import tqdm

from modcompile.errors import ConfigError
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.open_gates import open_gates
from modcompile.passes.harden_gates import score_and_bias
from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement, measure_precisions
from modcompile.text_loss import batches, count_predicted_tokens
from modcompile.tracing import eval_mode
from modcompile.weight_bytes import WeightBytes
from modcompile.weighted_quantile import weighted_quantile

DEPTH, PRECISION, BOTH = "depth alone", "precision alone", "both"
ROUTER = "router"


@dataclass(frozen=True)
class JointPoint:
    """A choice of bits, at a threshold of the depth gates."""

    way: str
    bits: str
    """Of all blocks, the mean of a static allocation, or that routers choose them."""
    active_ratio: float
    """Share of (token, gated layer) pairs that were executed."""
    bytes_per_token: float
    """Of weights, the mean over tokens (`WeightBytes`)."""
    measured: PrecisionMeasurement


def sweep_jointly(
    model: LayerwiseQuantizeForCausalLM,
    evaluation: PrecisionEvaluation,
    blocks: Dataset,
    calibration: Dataset,
    targets: Sequence[float],
    read: WeightBytes,
) -> list[JointPoint]:
    """Measure on `blocks` all bits of their `evaluation` where depth gates execute about `targets` of the work, too.

    - depth alone: at the most bits, the gates at each of the targets
    - precision alone: gates open, at each precision, each static allocation, and as trained routers choose
    - both: all others

    Gates have one threshold for all, by what they say of `calibration`, another text, while all are open; how much they
    then execute is measured. What is read is counted by `read`, the model's `weight_bytes`. Afterwards the model's
    routers and its gates decide as before.

    Raises:
        ConfigError: the model has no depth gates.
        DataError: there is no token to predict, or one that the model does not have.
    """
    if not model.depth_routers:
        raise ConfigError("there are no depth gates to sweep; train some with --route_depth, or leave --sweep out")
    predicted = count_predicted_tokens(blocks, model.config.vocab_size)
    highest = (model.precisions[-1],) * len(model.routers)
    measured = {bits: point for bits, point in evaluation.static.items() if len(set(bits)) > 1}
    measured |= {(bits,) * len(model.routers): point for bits, point in evaluation.fixed.items()}
    choices: list[tuple[int, ...] | None] = [*sorted(measured, key=sum), *([None] if evaluation.trained else [])]
    points = []

    def add(way: str, bits: tuple[int, ...] | None, found: PrecisionMeasurement) -> None:
        ratio = _active_ratio(model, found)
        points.append(JointPoint(way, _named(bits), ratio, read.per_token(found.shares), found))

    count = len(choices) * len(targets) + (1 if evaluation.trained else 0)
    with eval_mode(model), open_gates(model), tqdm(total=count * blocks.num_rows, delay=2, leave=False) as bar:
        bar.set_description("Evaluating depth and precision")
        measure = partial(measure_precisions, model, blocks=blocks, predicted=predicted, bar=bar)
        said = _said(model, calibration)
        for bits in choices:
            way = DEPTH if bits == highest else PRECISION
            add(way, bits, measure(None) if bits is None else measured[bits])
        for target in sorted(targets, reverse=True):
            least = weighted_quantile(said, torch.ones(len(said)), 1 - target)
            model.set_hard_threshold(float(torch.sigmoid(least)))
            for bits in choices:
                add(DEPTH if bits == highest else BOTH, bits, measure(bits))
        model.fix_precision(None)
    return points


def frontier(points: Sequence[JointPoint]) -> list[JointPoint]:
    """Those than which no other reads fewer bytes for as little perplexity, the fewest bytes first."""
    best: list[JointPoint] = []
    for point in sorted(points, key=lambda point: (point.bytes_per_token, point.measured.loss)):
        if not best or point.measured.loss < best[-1].measured.loss:
            best.append(point)
    return best


@torch.no_grad()
def _said(model: LayerwiseQuantizeForCausalLM, blocks: Dataset) -> torch.Tensor:
    """Router logits of all tokens and gates, `[N]`, at the most bits; these stay fixed."""
    count_predicted_tokens(blocks, model.config.vocab_size)
    model.fix_precision(model.precisions[-1])
    heard: list[torch.Tensor] = []
    handles = []
    for router in model.depth_routers.values():
        score, bias = score_and_bias(router, model.device)
        handles.append(
            score.register_forward_hook(lambda _, __, said, bias=bias: heard.append((said + bias).flatten()))
        )
    try:
        for batch in batches(blocks, 1, model.device):
            model.infer_forward(batch["input_ids"], batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(heard).double().cpu()


def _active_ratio(model: LayerwiseQuantizeForCausalLM, measured: PrecisionMeasurement) -> float:
    skipped = [measured.shares[layer].get(0, 0.0) for layer in model.depth_routers]
    return 1 - sum(skipped) / len(skipped)


def _named(bits: Sequence[int] | None) -> str:
    if bits is None:
        return ROUTER
    return str(bits[0]) if len(set(bits)) == 1 else f"{sum(bits) / len(bits):.2f}"
