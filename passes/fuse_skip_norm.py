"""One operator for a sum and the root-mean-square norm of it.

Before::

    s = add(x, y)
    n = rms_norm(s, [H], weight, eps)

After::

    n, s = skip_rms_norm(x, y, weight, eps)

It has a PyTorch reference here; ONNX Runtime has it as
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipSimplifiedLayerNormalization
"""

import torch
from torch import fx

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.graph_patterns import is_call, shape_of
from modcompile.passes.outlined_form import getitems

_aten = torch.ops.aten


@torch.library.custom_op("modcompile::skip_rms_norm", mutates_args=())
def skip_rms_norm(
    x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of `x + skip`, both `[B, T, H]` or `[M, H]`, times `weight [H]`; and the sum."""
    total = x + skip
    return torch.nn.functional.rms_norm(total, weight.shape, weight, eps), total


@skip_rms_norm.register_fake
def _(x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


SKIP_RMS_NORM = torch.ops.modcompile.skip_rms_norm.default


def fuse_skip_norm(graph: fx.Graph) -> int:
    """Fuse them in place; return how many.

    Keeps equal: every value, but for rounding.
    """
    fused = 0
    for norm in graph.find_nodes(op="call_function", target=_aten.rms_norm.default):
        total, _, *weight_and_eps = norm.args
        if not is_call(total, _aten.add.Tensor) or total.kwargs or len(weight_and_eps) != 2 or norm.kwargs:
            continue
        x, skip = total.args
        if not (isinstance(skip, fx.Node) and len(shape_of(x)) in (2, 3) and shape_of(x) == shape_of(skip)):
            continue
        order = list(graph.nodes)
        if None in weight_and_eps or any(order.index(user) < order.index(norm) for user in total.users):
            continue
        with graph.inserting_before(norm):
            values = getitems(graph.call_function(SKIP_RMS_NORM, (x, skip, *weight_and_eps)), 2)
        for old, new in zip((norm, total), values, strict=True):
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
        eliminate_dead_code(graph)
        fused += 1
    return fused
