"""What passes that look for a pattern of operators ask of a node."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._ops import OpOverload

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)


def is_call(value: Any, *targets: OpOverload) -> TypeGuard[fx.Node]:
    """Whether `value` is a node that calls one of the operators."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def is_reshape(value: Any) -> TypeGuard[fx.Node]:
    """Whether `value` is a node that gives a tensor another shape, and nothing else."""
    return is_call(value, *_VIEWS)


def shape_of(value: Any) -> tuple[Any, ...]:
    """Sizes, each an int or a symbolic expression, so that they can be compared; empty if they are not known."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(tensor, torch.Tensor):
        return ()
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in tensor.shape)


def dtype_of(value: Any) -> torch.dtype | None:
    """The dtype that a node was traced with."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tensor.dtype if isinstance(tensor, torch.Tensor) else None


def either_order(node: fx.Node) -> Sequence[tuple[Any, Any]]:
    """The two arguments of a commutative operator, both ways round."""
    first, second = node.args[:2]
    return (first, second), (second, first)
