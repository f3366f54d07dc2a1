"""Let adapters learn in coordinates in which what they read is white.

Some features of hidden states are a hundred times as large as others, and many vary together. An optimizer that moves
all numbers of a matrix alike (Adam) is held back by the few that count most. Of an adapter, down · hidden state is
(down · C^½) · (C^-½ · hidden state), with C the second moment of what it reads, so it may as well be down · C^½ that
takes the steps. That is the half of K-FAC (Martens and Grosse, 2015) that looks at inputs, with a C that is found once.

Measured on SmolLM2, from where `fit_routers` begins, 20 steps of 1,024 tokens at half the learning rate: a KL of 0.103
at 0.9 of the work where the plain factors have 0.130. But 70 steps at that rate became unstable, and ended no better
than 20, and a second training, of 25 steps from a fit on half of the text, had no gain: it is off unless asked for.
Whitened by what errors cost as well, no better; and Muon, for which all directions of a matrix are alike, undid what
was fitted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from modcompile.dense_layers import DenseLayers
from modcompile.fit_adapters import token_size
from modcompile.modeling import RoutedForCausalLM
from modcompile.skip_adapters import LowRankAdapter

_RIDGE = 0.1
"""Of the mean of the diagonal of C: directions that hardly occur are not blown up. 0.01 was worse."""


@torch.no_grad()
def input_whitening(
    model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int = 4
) -> dict[torch.nn.Parameter, torch.Tensor]:
    """For the first factor `[K, H]` of each adapter of low rank: C^-½ `[H, H]`, from `blocks` as sequences are packed.

    Hidden states are those of the dense model, each divided by its size, so that C is 1 in the mean of its diagonal.
    """
    adapters = {layer: each for layer, each in model.adapters.items() if isinstance(each, LowRankAdapter)}
    if not adapters:
        return {}
    moments = dict.fromkeys(adapters, torch.zeros((), dtype=torch.float64))
    tokens = 0
    layers = DenseLayers(model.base, model.router_config.granularity)
    for is_token, _, states in layers.over(blocks, batch_size, "Whitening"):
        for layer in adapters:
            read = states[layer][is_token].float()
            read = read / token_size(read)
            moments[layer] = moments[layer] + (read.T @ read).double().cpu()
        tokens += int(is_token.sum())
    return {
        each.down.get_parameter("weight"): _inverse_root(moments[layer] / tokens).to(model.device)
        for layer, each in adapters.items()
    }


def _inverse_root(moment: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(moment)
    root: torch.Tensor = (vectors / (values.clamp(min=0) + _RIDGE).sqrt()) @ vectors.T
    return root.float()


class WhitenedSteps:
    """Steps of an optimizer that some matrices `[K, H]` take in other coordinates: W = V · root, root `[H, H]`.

    Before a step, the gradient becomes that of V, and the matrix zero, so that what the optimizer leaves behind is the
    step of V. Its state is then V's; a checkpoint needs nothing else, as roots are found anew when it is resumed.
    Weights decay as AdamW has it, decoupled from the gradient.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, roots: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
        self._roots = roots
        self._before: dict[torch.nn.Parameter, torch.Tensor] = {}
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(self._leave)

    @torch.no_grad()
    def _enter(self, *_: Any) -> None:
        for matrix, root in self._roots.items():
            if matrix.grad is not None:
                matrix.grad.copy_(matrix.grad @ root)  # roots are symmetric
                self._before[matrix] = matrix.clone()
                matrix.zero_()

    @torch.no_grad()
    def _leave(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            kept = 1 - group["lr"] * group.get("weight_decay", 0.0)
            for matrix in group["params"]:
                before = self._before.pop(matrix, None)
                if before is not None:
                    matrix.copy_(kept * before + matrix @ self._roots[matrix])
