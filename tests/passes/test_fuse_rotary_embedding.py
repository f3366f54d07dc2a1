import pytest
import torch
from torch import fx
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.equal_halves import has_equal_halves
from modcompile.passes.fuse_rotary_embedding import fuse_rotary_embedding
from tests.passes.traced import BATCH, TOKENS, Function, Run, calls, random, traced

_HEADS, _SIZE = 4, 8
_X = random(BATCH, _HEADS, TOKENS, _SIZE)
_PACKED = random(BATCH, TOKENS, _HEADS * _SIZE)
_ANGLES = random(BATCH, TOKENS, _SIZE // 2, seed=1)


def _fused(gm: fx.GraphModule, *, tables_are_known: bool = True) -> int:
    eliminate_dead_code(gm.graph)
    known: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if tables_are_known and has_equal_halves(node, known):
            known.add(node)
    count = fuse_rotary_embedding(gm.graph, known)
    eliminate_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return count


def _tables(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat([angles, angles], -1)
    return both.cos() * 1.5, both.sin() * 1.5


def _apply(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x, *_tables(angles))[0]


def _of_heads(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return _apply(x, angles)


def _of_projection(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return _apply((x * 2).view(x.shape[0], x.shape[1], -1, _SIZE).transpose(1, 2), angles)


def _turned_first(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return sin * rotate_half(x) + cos * x


@pytest.mark.parametrize(
    ("function", "x"), [(_of_heads, _X), (_of_projection, _PACKED), (_turned_first, _X)], ids=lambda value: ""
)
def test_fuses_what_models_write(function: Function, x: torch.Tensor) -> None:
    gm = traced(Run(function), x, _ANGLES)
    expected = gm(x, _ANGLES)
    assert _fused(gm) == 1
    assert calls(gm)["RotaryEmbedding"] == 1
    assert not {"neg", "add"} & calls(gm).keys()
    torch.testing.assert_close(gm(x, _ANGLES), expected)
    other = torch.randn(2, *x.shape[1:])
    torch.testing.assert_close(gm(other, _ANGLES[:2])[0], function(Run(function), other, _ANGLES[:2]))


def test_rotates_packed_heads_where_they_are() -> None:
    gm = traced(Run(_of_projection), _PACKED, _ANGLES)
    _fused(gm)
    (rotary,) = [node for node in gm.graph.nodes if str(node.target).startswith("onnx.RotaryEmbedding")]
    assert rotary.args[0].meta["val"].dim() == 3
    assert rotary.kwargs == {"num_heads": _HEADS}


def test_fuses_queries_and_keys() -> None:
    def function(_: Run, x: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return apply_rotary_pos_emb(x, x[:, :2], *_tables(angles))

    gm = traced(Run(function), _X, _ANGLES)
    expected = gm(_X, _ANGLES)
    assert _fused(gm) == 2
    assert _fused(gm) == 0
    torch.testing.assert_close(gm(_X, _ANGLES), expected)


def test_skips_tables_of_which_nothing_is_known() -> None:
    gm = traced(Run(_of_heads), _X, _ANGLES)
    assert _fused(gm, tables_are_known=False) == 0


def _unequal_halves(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    both = torch.cat([angles, 2 * angles], -1)
    return apply_rotary_pos_emb(x, x, both.cos(), both.sin())[0]


def _interleaved(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return x * cos + turned * sin


def _turned_the_other_way(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned = torch.cat([x[..., _SIZE // 2 :], -x[..., : _SIZE // 2]], -1)
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return x * cos + turned * sin


def _not_turned(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned = torch.cat([-x[..., : _SIZE // 2], x[..., _SIZE // 2 :]], -1)
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return x * cos + turned * sin


def _turned_at_another_place(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    turned = torch.cat([-x[..., 2:], x[..., :2]], -1)
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return x * cos + turned * sin


def _of_another_tensor(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return x * cos + rotate_half(x + 1) * sin


def _scaled_sum(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = (table.unsqueeze(1) for table in _tables(angles))
    return torch.add(x * cos, rotate_half(x) * sin, alpha=2)


def _one_table_for_all_rows(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    return _apply(x, angles[:1])


def _tables_of_every_head(_: Run, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    cos, sin = (table.unsqueeze(2).transpose(1, 2) for table in _tables(angles))
    return x * cos + rotate_half(x) * sin


@pytest.mark.parametrize(
    "function",
    [
        _unequal_halves,
        _interleaved,
        _turned_the_other_way,
        _not_turned,
        _turned_at_another_place,
        _of_another_tensor,
        _scaled_sum,
        _one_table_for_all_rows,
        _tables_of_every_head,
    ],
)
def test_skips_what_is_none(function: Function) -> None:
    gm = traced(Run(function), _X, _ANGLES)
    expected = gm(_X, _ANGLES)
    assert _fused(gm) == 0
    torch.testing.assert_close(gm(_X, _ANGLES), expected, rtol=0, atol=0)
