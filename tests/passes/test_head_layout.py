from collections.abc import Callable

import pytest
import torch
from torch import fx

from modcompile.passes.head_layout import pack_heads, split_heads, unpack_heads
from tests.passes.traced import BATCH, TOKENS, Function, Run, random, traced

_X = random(BATCH, TOKENS, 32)


def _result(gm: fx.GraphModule) -> fx.Node:
    (output,) = gm.graph.find_nodes(op="output")
    node = output.args[0][0]
    assert isinstance(node, fx.Node)
    return node


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2),
        lambda _, x: x.reshape(x.shape[0], x.shape[1], -1, 8).transpose(2, 1),
    ],
)
def test_finds_what_was_split(function: Function) -> None:
    gm = traced(Run(function), _X)
    split = split_heads(_result(gm))
    assert split is not None
    assert [node.op for node in (split.packed, split.view, split.transposed)] == ["placeholder", *["call_function"] * 2]


def test_splits_another_tensor_alike() -> None:
    gm = traced(Run(lambda _, x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)), _X)
    result = _result(gm)
    split = split_heads(result)
    assert split is not None
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (split.packed, 2))
        doubled.meta = dict(split.packed.meta)
        again = split.again(doubled)
    output.args = ((again,),)
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(_X)[0], (2 * _X).view(BATCH, TOKENS, 4, 8).transpose(1, 2), rtol=0, atol=0)
    made = split_heads(again)
    assert made is not None
    assert made.packed is doubled


@pytest.mark.parametrize(
    "function",
    [
        lambda _, x: x,
        lambda _, x: x.view(x.shape[0], x.shape[1], 4, 8),
        lambda _, x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 3),
        lambda _, x: x.transpose(1, 2),
        lambda _, x: x.view(x.shape[0], -1, 8, 8).transpose(1, 2),
        lambda _, x: x.view(x.shape[0], x.shape[1], 2, 2, 8).transpose(1, 2),
    ],
)
def test_finds_nothing_else(function: Function) -> None:
    assert split_heads(_result(traced(Run(function), random(BATCH, 6, 32)))) is None


def _with_result(gm: fx.GraphModule, change: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The graph returns, in place, what `change` makes of its result."""
    (output,) = gm.graph.find_nodes(op="output")
    with gm.graph.inserting_before(output):
        changed = change(_result(gm))
    output.args = ((changed,),)
    gm.graph.lint()
    gm.recompile()
    return changed


def test_packs_heads_by_taking_what_was_split() -> None:
    gm = traced(Run(lambda _, x: x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)), _X)
    assert _with_result(gm, pack_heads).op == "placeholder"


def test_packs_and_unpacks_other_heads() -> None:
    heads = random(BATCH, 4, TOKENS, 8)
    gm = traced(Run(lambda _, x: 2 * x), heads)
    before = _result(gm)
    packed = _with_result(gm, pack_heads)
    expected = (2 * heads).transpose(1, 2).flatten(2)
    torch.testing.assert_close(gm(heads)[0], expected, rtol=0, atol=0)
    assert packed.meta["val"].shape == before.meta["val"].transpose(1, 2).flatten(2).shape
    assert split_heads(_with_result(gm, lambda node: unpack_heads(node, before))) is not None
    other = random(2, 4, TOKENS + 1, 8)
    torch.testing.assert_close(gm(other)[0], 2 * other, rtol=0, atol=0)
