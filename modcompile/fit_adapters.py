"""Let adapters begin as the best stand-ins for their layers that are linear and of their rank.

For the hidden states x in front of a layer and what it adds to them, y, reduced-rank regression (Izenman, 1975) finds
the matrix of rank k with the least squared error: with B = (X'X + ridge)⁻¹ X'Y and the first k eigenvectors V of
B'X'XB, it is BVV', so down is (BV)' and up is V. One pass of the dense model over some text is all that it takes, and a
training then need not find again what least squares know.

Errors weigh as a `metric` M says, a symmetric matrix: (error)' M (error). With M = SS', that is the regression of YS
whose result is taken back by S⁻¹. For the M of `skip_costs`, it is what errors cost in loss, to the second order.
"""

import torch
from datasets import Dataset

from modcompile.dense_layers import DenseLayers
from modcompile.modeling import RoutedForCausalLM
from modcompile.skip_adapters import LowRankAdapter

_RIDGE = 1e-3
"""Of the mean of the diagonal of X'X: features that hardly vary get no large weights."""
_METRIC_RIDGE = 0.03
"""Of the mean of the diagonal of M: no error is for free."""


class AdapterSums:
    """Sums over tokens from which an adapter is fitted; every token weighs alike, however large its hidden state is.

    That of a first token is often a hundred times as large as the others.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self._sums = torch.zeros(2, hidden_size, hidden_size, device=device)

    def add(self, before: torch.Tensor, after: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Hidden states `[N, H]` in front of a layer and behind it, and what each token is to count, `[N]`."""
        x = before.float()
        size = token_size(x)
        x, y = x / size, (after.float() - x) / size
        weighted = x if weights is None else x * weights.unsqueeze(1)
        self._sums += torch.stack([weighted.T @ x, weighted.T @ y])

    @torch.no_grad()
    def fit(self, adapter: LowRankAdapter, metric: torch.Tensor | None = None) -> None:
        """Give an adapter the weights with the least error, by a metric `[H, H]` of errors by `token_size`."""
        xx, xy = self._sums.double()
        eye = torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        linear = torch.linalg.solve(xx + _RIDGE * xx.diagonal().mean() * eye, xy)
        root = inverse = eye
        if metric is not None:
            given = metric.double()
            values, vectors = torch.linalg.eigh(given + _METRIC_RIDGE * given.diagonal().mean() * eye)
            root, inverse = vectors * values.sqrt(), (vectors / values.sqrt()).T
        image = linear @ root
        _, vectors = torch.linalg.eigh(image.T @ xx @ image)  # the largest eigenvalues come last
        kept = vectors[:, -adapter.down.out_features :]
        up, down = _balanced((kept.T @ inverse).T, (image @ kept).T)
        adapter.up.weight.copy_(up)
        adapter.down.weight.copy_(down)


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `[H, K]` and `[K, H]` with the same product that are alike: orthogonal directions, of one size in both.

    As they come out of the regression, one is as much larger than the other as hidden states are than gradients, up to
    hundreds of times, and an optimizer that moves all numbers alike (Adam) would leave the larger one as it is.
    """
    left, left_factor = torch.linalg.qr(up)
    right, right_factor = torch.linalg.qr(down.T)
    rotation, sizes, other = torch.linalg.svd(left_factor @ right_factor.T)
    roots = sizes.sqrt()
    return left @ (rotation * roots), (roots.unsqueeze(1) * other) @ right.T


def token_size(states: torch.Tensor) -> torch.Tensor:
    """The root of the mean square of each hidden state: `[N, H]` → `[N, 1]`."""
    return states.float().square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def new_adapters(model: RoutedForCausalLM) -> dict[int, LowRankAdapter]:
    """Those that can be fitted, and have been neither fitted nor trained."""
    return {
        layer: adapter
        for layer, adapter in model.adapters.items()
        if isinstance(adapter, LowRankAdapter) and adapter.is_new
    }


@torch.no_grad()
def fit_adapters(model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int = 4) -> None:
    """Fit new adapters of low rank to what their layers do on `blocks`, as `tokenize_and_pack` makes them.

    Adapters of another kind, and those that have been fitted or trained, stay as they are.
    """
    adapters = new_adapters(model)
    if not adapters:
        return
    hidden_size = next(iter(adapters.values())).down.in_features
    sums = {layer: AdapterSums(hidden_size, model.device) for layer in adapters}

    layers = DenseLayers(model.base, model.router_config.granularity)
    for is_token, _, states in layers.over(blocks, batch_size, "Fitting adapters"):
        for layer in adapters:
            sums[layer].add(states[layer][is_token], states[layer + 1][is_token])
    for layer, adapter in adapters.items():
        sums[layer].fit(adapter)
