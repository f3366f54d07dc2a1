"""By how much the bits of each decoder block change what a model predicts.

Measured is the divergence from the predictions at the highest precision, not the loss on the text: that of a few
thousand tokens rises and falls at random by more than a block at 8 bits costs.
"""

from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import kl_div
from tqdm import tqdm

from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.open_gates import open_gates
from modcompile.static_allocation import Sensitivity, measure_sensitivity
from modcompile.text_loss import batches


@torch.no_grad()
def measure_block_sensitivity(model: LayerwiseQuantizeForCausalLM, num_blocks: int, blocks: Dataset) -> Sensitivity:
    """The mean over the tokens of `blocks` of KL(highest precision ‖ one block lower), in nats, all depth gates open.

    `blocks` are sequences as `tokenize_and_pack` makes them. The model is left with bits that are fixed.
    """
    sums: Sensitivity = [dict.fromkeys(reversed(model.precisions), 0.0) for _ in range(num_blocks)]
    tokens = 0
    calls = num_blocks * (len(model.precisions) - 1) + 2
    with (
        open_gates(model),
        tqdm(total=calls * blocks.num_rows, desc="Measuring sensitivity", unit="sequence", delay=2, leave=False) as bar,
    ):
        for batch in batches(blocks, 1, model.device):
            for total, by_bits in zip(sums, _of_sequence(model, num_blocks, batch, bar), strict=True):
                for bits, increase in by_bits.items():
                    total[bits] += increase
            tokens += batch["input_ids"].shape[1]
    return [{bits: total / tokens for bits, total in by_bits.items()} for by_bits in sums]


def _of_sequence(
    model: LayerwiseQuantizeForCausalLM, num_blocks: int, batch: dict[str, torch.Tensor], bar: "tqdm[Any]"
) -> Sensitivity:
    """The sum over the tokens of one sequence: its predictions at the highest precision are kept meanwhile."""
    expected = _log_probabilities(model, model.precisions[-1], batch, bar)

    def divergence(bits: list[int]) -> float:
        found = _log_probabilities(model, bits, batch, bar)
        return float(kl_div(found, expected, log_target=True, reduction="none").sum(-1).double().sum())

    return measure_sensitivity(divergence, num_blocks, model.precisions)


def _log_probabilities(
    model: LayerwiseQuantizeForCausalLM, num_bits: int | list[int], batch: dict[str, torch.Tensor], bar: "tqdm[Any]"
) -> torch.Tensor:
    model.fix_precision(num_bits)
    logits = model.infer_forward(batch["input_ids"], batch["attention_mask"], use_cache=False).logits
    assert logits is not None
    bar.update()
    return logits.float().log_softmax(-1)
