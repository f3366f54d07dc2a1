import pytest
import torch
from torch import fx

from modcompile.passes import fuse_operators
from modcompile.passes.align_rows import AlignRows, RestoreRows, align_rows
from modcompile.passes.fuse_group_query_attention import fuse_group_query_attention
from tests.cached_steps import Step, at_tokens, run_steps, steps
from tests.model_inputs import Padding
from tests.passes.traced import random
from tests.wide_models import MAX_POSITIONS, NUM_LAYERS, wide_lowered, wide_model, wide_outlined

_MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("past", [0, 3])
def test_a_row_begins_with_its_first_token(past: int) -> None:
    ids = torch.arange(20).view(5, 4)
    mask = torch.cat([torch.ones(5, past, dtype=torch.long), _MASK], 1)
    aligned, aligned_mask, positions, restore = AlignRows()(ids, mask, ids + 100)
    for row, kept in enumerate(_MASK.bool()):
        tokens = ids[row][kept]
        assert aligned[row, : len(tokens)].tolist() == tokens.tolist()
        assert aligned_mask[row].tolist() == [1] * (past + len(tokens)) + [0] * (4 - len(tokens))
    torch.testing.assert_close(positions, aligned + 100, rtol=0, atol=0)
    assert aligned.sort(1).values.tolist() == ids.tolist()
    (restored,) = RestoreRows()(aligned, restore)
    torch.testing.assert_close(restored, ids, rtol=0, atol=0)


def test_restores_whatever_tokens_have() -> None:
    x = random(5, 4, 3)
    _, _, _, restore = AlignRows()(torch.zeros(5, 4, dtype=torch.long), _MASK, torch.zeros(5, 4, dtype=torch.long))
    order = restore.argsort(1)
    aligned = x.gather(1, order.unsqueeze(2).expand_as(x))
    torch.testing.assert_close(RestoreRows()(aligned, restore)[0], x, rtol=0, atol=0)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest) -> tuple[str, fx.GraphModule, fx.GraphModule]:
    """An architecture, its lowered graph, and the fused one with aligned rows."""
    lowered = wide_lowered(request.param)
    fused = fuse_group_query_attention(fuse_operators(lowered), MAX_POSITIONS)
    return request.param, lowered, align_rows(fused)


def _both_sides(run: list[Step]) -> list[Step]:
    """Row 1 gets padding on its right, too."""
    prefill = run[0].input_ids.shape[1]
    changed = []
    for step in run:
        mask = step.attention_mask.clone()
        mask[1, prefill - 1] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.input_ids.shape[1] :]
        changed.append(Step(step.input_ids, mask, positions))
    return changed


@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
def test_computes_the_same_at_tokens(pair: tuple[str, fx.GraphModule, fx.GraphModule], padding: str) -> None:
    architecture, lowered, gm = pair
    model = wide_model(architecture)
    sides: dict[str, Padding] = {"none": "none", "left": "left", "right": "right", "both": "left"}
    run = steps(model, sides[padding])
    if padding == "both":
        run = _both_sides(run)
    seen = set()
    for graph in (lowered, gm):
        graph.get_buffer("routing_threshold").fill_(0.5)
    for call, expected, actual in zip(run, *(run_steps(each, model, run) for each in (lowered, gm)), strict=True):
        logits, *masks = at_tokens(expected, call, 2 * NUM_LAYERS)
        aligned_logits, *aligned_masks = at_tokens(actual, call, 2 * NUM_LAYERS)
        torch.testing.assert_close(aligned_logits, logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(aligned_masks, masks, rtol=0, atol=0)
        if padding == "none":
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
        seen |= {bool(value) for mask in masks for value in mask.flatten()}
    assert seen == {True, False}


@pytest.mark.parametrize("padding", ["none", "left"])
def test_takes_several_tokens_after_others(padding: Padding) -> None:
    """In one row, which may have begun with padding."""
    dense, model = wide_outlined("llama"), wide_model("llama")
    gm = align_rows(fuse_group_query_attention(fuse_operators(dense), MAX_POSITIONS))
    whole = steps(model, padding, lengths=(4, 3, 2))
    run = [Step(step.input_ids[1:2], step.attention_mask[1:2], step.position_ids[1:2]) for step in whole]
    for call, *outputs in zip(run, *(run_steps(each, model, run) for each in (gm, dense)), strict=True):
        torch.testing.assert_close(*(at_tokens(each, call, 2 * NUM_LAYERS) for each in outputs), rtol=0, atol=1e-4)
