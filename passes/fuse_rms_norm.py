"""One operator for a root-mean-square norm.

Before::

    y = weight * (x * rsqrt(mean(pow(x, 2), -1) + eps))

After::

    y = rms_norm(x, [H], weight, eps)

(Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.)
"""

from typing import Any

import torch
from torch import fx

from modcompile.passes.graph_patterns import either_order, is_call, shape_of

_aten = torch.ops.aten


def fuse_rms_norm(graph: fx.Graph) -> int:
    """Fuse them in place; return how many. What was fused and has other users stays for them.

    Keeps equal: every value, but for rounding.
    """
    fused = 0
    for node in graph.find_nodes(op="call_function", target=_aten.mul.Tensor):
        for weight, normalised in either_order(node):
            matched = _normalised(normalised)
            if matched is None or shape_of(weight) != shape_of(normalised)[-1:]:
                continue
            x, eps = matched
            with graph.inserting_before(node):
                norm = graph.call_function(_aten.rms_norm.default, (x, list(shape_of(weight)), weight, eps))
            norm.meta = dict(node.meta)
            node.replace_all_uses_with(norm)
            graph.erase_node(node)
            fused += 1
            break
    return fused


def _normalised(value: Any) -> tuple[fx.Node, float] | None:
    """X and eps of `x * rsqrt(mean(pow(x, 2), -1) + eps)`."""
    if not is_call(value, _aten.mul.Tensor):
        return None
    for x, root in either_order(value):
        if not (is_call(root, _aten.rsqrt.default) and is_call(biased := root.args[0], _aten.add.Tensor)):
            continue
        mean, eps = biased.args
        if not (is_call(mean, _aten.mean.dim) and isinstance(eps, float) and not biased.kwargs):
            continue
        power, *how = mean.args
        if how == [[-1], True] and is_call(power, _aten.pow.Tensor_Scalar) and power.args == (x, 2):
            assert isinstance(x, fx.Node)
            return x, eps
    return None
