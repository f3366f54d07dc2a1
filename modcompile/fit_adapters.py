"""Let adapters begin as the best stand-ins for their blocks that are linear and of their rank.

For the hidden states x in front of a block and what it adds to them, y, reduced-rank regression (Izenman, 1975) finds
the matrix of rank k with the least squared error: with B = (X'X + ridge)⁻¹ X'Y and the first k eigenvectors V of
B'X'XB, it is BVV', so down is (BV)' and up is V. One pass of the dense model over some text is all that it takes, and a
training then need not find again what least squares know.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from modcompile.modeling import RoutedForCausalLM
from modcompile.skip_adapters import LowRankAdapter
from modcompile.text_loss import batches
from modcompile.tracing import find_layers

_RIDGE = 1e-3
"""Of the mean of the diagonal of X'X: features that hardly vary get no large weights."""


@torch.no_grad()
def fit_adapters(model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int = 4) -> None:
    """Fit new adapters of low rank to what their layers do on `blocks`, as `tokenize_and_pack` makes them.

    Every token weighs alike, however large its hidden state is: that of a first token is often a hundred times as large
    as the others. Adapters of another kind, and those that have been fitted or trained, stay as they are.
    """
    adapters = {
        layer: adapter
        for layer, adapter in model.adapters.items()
        if isinstance(adapter, LowRankAdapter) and adapter.is_new
    }
    if not adapters:
        return
    hidden_size = next(iter(adapters.values())).down.in_features
    sums = {layer: torch.zeros(2, hidden_size, hidden_size, device=model.device) for layer in adapters}
    is_token = torch.zeros(())

    def add(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        x = before[is_token].float()
        size = x.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
        x, y = x / size, (after[is_token].float() - x) / size
        sums[layer] += torch.stack([x.T @ x, x.T @ y])

    with _listening(model, add, set(adapters)):
        for batch in tqdm(
            batches(blocks, batch_size, model.device),
            "Fitting adapters",
            total=-(-blocks.num_rows // batch_size),
            delay=2,
            leave=False,
        ):
            is_token = batch["attention_mask"] != 0
            model.base(batch["input_ids"], batch["attention_mask"], use_cache=False)
    for layer, adapter in adapters.items():
        _fit(adapter, *sums[layer].double())


def _fit(adapter: LowRankAdapter, xx: torch.Tensor, xy: torch.Tensor) -> None:
    ridge = _RIDGE * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    linear = torch.linalg.solve(xx + ridge, xy)
    _, vectors = torch.linalg.eigh(linear.T @ xx @ linear)  # the largest eigenvalues come last
    up = vectors[:, -adapter.down.out_features :]
    adapter.up.weight.copy_(up)
    adapter.down.weight.copy_((linear @ up).T)


@contextmanager
def _listening(
    model: RoutedForCausalLM, heard: Callable[[int, torch.Tensor, torch.Tensor], None], layers: set[int]
) -> Iterator[None]:
    """Have `heard` called with each of these layers and the hidden states `[B, T, H]` before and after it."""

    def hook(layer: int) -> Callable[..., None]:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            heard(layer, before, output[0] if isinstance(output, tuple) else output)

        return called

    modules = find_layers(model.base)
    handles = [modules[layer].register_forward_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
