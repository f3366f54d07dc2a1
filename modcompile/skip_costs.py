"""What it costs in loss to let a token skip a layer, from one pass of the dense model forward and some back.

For a hidden state behind a layer that is wrong by d, the divergence of the model's prediction from what it was grows by
½ d' F d, to the second order, where F is the Fisher information: the mean of g g' over labels drawn from the prediction
itself, of which g is the loss's gradient with respect to the hidden state (Amari, 1998). So with some labels drawn for
every token, its cost is the mean of ½ (g · d)². That is no first-order importance, for which the model's own prediction
is right and every gradient nothing but noise: of a step as large as that of a layer it says how far it leads away.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from modcompile.dense_layers import DenseLayers
from modcompile.drawn_labels import label_gradient
from modcompile.granularity import Granularity
from modcompile.required_memory import require_memory

_NUM_LABELS = 2
"""Drawn for every token. Costs are noisy, and what is learned from them are means over thousands of tokens."""


@dataclass(frozen=True)
class DenseTrace:
    """Of N tokens of a text, padding left out: L + 1 hidden states `[N, H]`, and gradients at all but the first."""

    states: list[torch.Tensor]
    gradients: list[torch.Tensor]
    """`[S, N, H]` each, for S drawn labels."""

    def costs(self, layer: int, predicted: torch.Tensor) -> torch.Tensor:
        """`[N]`: in nats a sequence, of `predicted [N, H]` in the place of what stands behind a layer."""
        wrong = self.states[layer + 1] - predicted
        return 0.5 * (self.gradients[layer] * wrong).sum(-1).square().mean(0)

    def metric(self, layer: int, sizes: torch.Tensor) -> torch.Tensor:
        """The mean F behind a layer, `[H, H]`, of errors that are divided by `sizes [N, 1]`."""
        scaled = (self.gradients[layer] * sizes).flatten(0, 1)
        return scaled.T @ scaled / len(scaled)


def trace_dense(
    base: PreTrainedModel,
    granularity: Granularity,
    blocks: Dataset,
    *,
    batch_size: int,
    seed: int,
    option: str = "--router_start_samples",
    instead: str = "fewer of them, or a shorter --sequence_length",
) -> DenseTrace:
    """Run a base model on `blocks`, as `tokenize_and_pack` makes them; in float32, on its device.

    Takes memory for about `(1 + 2) * N * L * H` numbers, as `option` asked for; a user may give something `instead`.

    Raises:
        ConfigError: there is not as much.
    """
    generator = torch.Generator(base.device).manual_seed(seed)
    layers = DenseLayers(base, granularity)
    num_tokens = sum(sum(row) for row in blocks["attention_mask"])
    numbers = (1 + _NUM_LABELS) * num_tokens * layers.count * base.config.hidden_size
    require_memory(numbers, base.device, option, instead)
    # Each as one tensor from the start: joined at the end, they would take twice the memory.
    size, device = base.config.hidden_size, base.device
    states = [torch.empty(num_tokens, size, device=device) for _ in range(layers.count + 1)]
    gradients = [torch.empty(_NUM_LABELS, num_tokens, size, device=device) for _ in range(layers.count)]
    begin = 0
    with torch.enable_grad():
        for is_token, logits, seen in layers.over(blocks, batch_size, "Tracing the dense model"):
            rows = slice(begin, begin + int(is_token.sum()))
            for number in range(_NUM_LABELS):
                of_labels = label_gradient(logits, is_token, generator)
                more = number + 1 < _NUM_LABELS
                found = torch.autograd.grad(logits, seen[1:], of_labels, retain_graph=more)
                for kept, gradient in zip(gradients, found, strict=True):
                    kept[number, rows] = gradient[is_token].float()
            for kept, state in zip(states, seen, strict=True):
                kept[rows] = state.detach()[is_token].float()
            begin = rows.stop
    return DenseTrace(states, gradients)
