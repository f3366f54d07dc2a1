import pytest
import torch
from torch import fx

from modcompile.graph_inputs import cache_inputs, graph_inputs, updated_cache
from modcompile.tracing import to_cache
from tests.tiny_graphs import outlined_graph

_IDS = torch.arange(6).view(2, 3)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return outlined_graph("llama")


def test_counts_positions_from_the_mask(graph: fx.GraphModule) -> None:
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    ids, attention_mask, position_ids, *_ = graph_inputs(graph, _IDS, mask)
    assert torch.equal(ids, _IDS)
    assert torch.equal(attention_mask, mask)
    assert position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]


def test_without_a_mask_every_token_counts(graph: fx.GraphModule) -> None:
    _, attention_mask, position_ids, *past = graph_inputs(graph, _IDS)
    assert attention_mask.tolist() == [[1] * 3] * 2
    assert position_ids.tolist() == [[0, 1, 2]] * 2
    assert [tuple(tensor.shape) for tensor in past] == [(2, 2, 0, 8)] * 6


def test_takes_positions_of_all_tokens_or_one_row_for_all(graph: fx.GraphModule) -> None:
    _, _, position_ids, *_ = graph_inputs(graph, _IDS, None, torch.arange(5).unsqueeze(0))
    assert position_ids.tolist() == [[2, 3, 4]] * 2


def test_goes_on_from_a_cache(graph: fx.GraphModule) -> None:
    pairs = [(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)) for _ in range(3)]
    _, attention_mask, position_ids, *past = graph_inputs(graph, _IDS, None, None, to_cache(pairs))
    assert attention_mask.shape == (2, 7)
    assert position_ids.tolist() == [[4, 5, 6]] * 2
    assert all(torch.equal(one, other) for one, other in zip(past, sum(pairs, ()), strict=True))


def test_a_graph_without_a_cache_takes_tokens_only() -> None:
    graph = outlined_graph("llama", use_cache=False)
    assert cache_inputs(graph) == []
    assert len(graph_inputs(graph, _IDS)) == 3


def test_a_cache_is_filled_in_place_or_made() -> None:
    present = [torch.randn(2, 2, 4, 8) for _ in range(6)]
    cache = updated_cache(None, present)
    assert cache.get_seq_length() == 4
    longer = [torch.cat([tensor, tensor], 2) for tensor in present]
    assert updated_cache(cache, longer) is cache
    assert cache.get_seq_length() == 8
