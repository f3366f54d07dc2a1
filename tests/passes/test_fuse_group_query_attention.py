from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from modcompile.passes import fuse_operators
from modcompile.passes.choose_precision import choose_precision
from modcompile.passes.fuse_group_query_attention import AttentionLengths, fuse_group_query_attention
from modcompile.passes.group_query_attention import GROUP_QUERY_ATTENTION
from modcompile.passes.outlined_form import copy_graph
from modcompile.passes.read_attention_inputs import NotFusedError
from tests.cached_steps import at_tokens, run_steps, steps
from tests.model_inputs import Padding
from tests.passes.block_versions import branches_of, with_blocks
from tests.passes.traced import calls
from tests.tiny_graphs import outlined_graph
from tests.tiny_models import SLIDING_WINDOW
from tests.wide_models import (
    MAX_POSITIONS,
    NUM_LAYERS,
    WIDE_ARCHITECTURES,
    paddings,
    wide_lowered,
    wide_model,
    wide_outlined,
)


def fused(gm: fx.GraphModule) -> fx.GraphModule:
    return fuse_group_query_attention(fuse_operators(gm), MAX_POSITIONS)


def all_calls(gm: fx.GraphModule) -> Counter[str]:
    graphs = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    return sum(map(calls, graphs), Counter())


@pytest.fixture(scope="module", params=WIDE_ARCHITECTURES)
def pair(request: pytest.FixtureRequest) -> tuple[str, fx.GraphModule, fx.GraphModule]:
    """An architecture, its lowered graph and the fused one."""
    lowered = wide_lowered(request.param)
    return request.param, lowered, fused(lowered)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_computes_what_the_graph_before_it_did(
    pair: tuple[str, fx.GraphModule, fx.GraphModule], threshold: float
) -> None:
    architecture, lowered, gm = pair
    for graph in (lowered, gm):
        graph.get_buffer("routing_threshold").fill_(threshold)
    model = wide_model(architecture)
    seen = set()
    for padding in paddings(architecture, "none", "right"):
        run = steps(model, padding)
        for call, expected, actual in zip(run, *(run_steps(each, model, run) for each in (lowered, gm)), strict=True):
            wanted = at_tokens(expected, call, 2 * NUM_LAYERS)
            torch.testing.assert_close(at_tokens(actual, call, 2 * NUM_LAYERS), wanted, rtol=0, atol=1e-4)
            if padding == "none":
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
            seen |= {bool(value) for mask in wanted[1:] for value in mask.flatten()}
    assert seen == ({True, False} if threshold == 0.5 else {threshold == 0.0})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_takes_several_tokens_after_others(architecture: str) -> None:
    dense, model = wide_outlined(architecture), wide_model(architecture)
    run = steps(model, "none", batch=1, lengths=(4, 3, 2))
    results = [list(run_steps(graph, model, run)) for graph in (fused(dense), dense)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_leaves_no_other_attention_and_no_other_append(pair: tuple[str, fx.GraphModule, fx.GraphModule]) -> None:
    _, lowered, gm = pair
    operators = all_calls(gm)
    branches = NUM_LAYERS + len(lowered.get_buffer("routing_threshold"))
    assert operators["group_query_attention"] == branches
    assert not {"Attention", "RotaryEmbedding"} & operators.keys()
    blocks = (child for name, child in gm.named_modules() if name.startswith("blocks.") and "decide" not in name)
    assert not any(calls(block)["cat"] for block in blocks if isinstance(block, fx.GraphModule))


def windows(gm: fx.GraphModule, layer: int) -> list[int]:
    """Of all attention in a block and in its branches."""
    prefix = f"blocks.{layer}"
    inside = [module for name, module in gm.named_modules() if name == prefix or name.startswith(f"{prefix}.")]
    nodes = [node for module in inside if isinstance(module, fx.GraphModule) for node in module.graph.nodes]
    return [int(str(node.args[-1])) for node in nodes if node.target is GROUP_QUERY_ATTENTION]


def test_a_skipped_token_attends_to_itself_alone() -> None:
    gm = fused(wide_lowered("llama"))
    assert [sorted(windows(gm, layer)) for layer in range(NUM_LAYERS)] == [[-1, 1], [-1], [-1, 1]]


def test_hybrid_layers_have_windows_of_their_own() -> None:
    gm = fused(wide_outlined("gemma3"))
    assert [windows(gm, layer) for layer in range(NUM_LAYERS)] == [[SLIDING_WINDOW], [-1], [SLIDING_WINDOW]]


def test_shares_parameters_and_leaves_its_argument_alone() -> None:
    gm = fuse_operators(wide_lowered("llama"))
    before = [module.code for module in gm.modules() if isinstance(module, fx.GraphModule)]
    result = fuse_group_query_attention(gm, MAX_POSITIONS)
    assert {id(parameter) for parameter in result.parameters()} <= {id(parameter) for parameter in gm.parameters()}
    assert [module.code for module in gm.modules() if isinstance(module, fx.GraphModule)] == before


def test_new_tokens_follow_the_real_ones_of_the_past() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0]])
    lengths, total = AttentionLengths()(torch.zeros(3, 2), mask)
    assert lengths.tolist() == [5, 3, 2]
    assert (total.tolist(), lengths.dtype, total.dtype) == (6, torch.int32, torch.int32)


class _Router(nn.Module):
    """Logits `[B, S, P]` of as many precisions as are asked for, of each token or of the first one of a row."""

    def __init__(self, num_precisions: int, *, for_tokens: bool) -> None:
        super().__init__()
        self.num_precisions = num_precisions
        self.end = None if for_tokens else 1

    def forward(self, hidden: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return hidden[:, : self.end, : self.num_precisions] * 10


def _choosing(num_precisions: int, *, for_tokens: bool = False) -> fx.GraphModule:
    dense = wide_outlined("llama")
    versions = dict(list(branches_of(dense, 1).items())[:num_precisions])
    router = _Router(num_precisions, for_tokens=for_tokens)
    return choose_precision(dense, {1: versions}, {1: router}, for_tokens=for_tokens)


@pytest.mark.parametrize("choice", [0, 1])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_fuses_blocks_of_two_precisions(choice: int, padding: Padding) -> None:
    choosing, model = _choosing(2), wide_model("llama")
    gm = fused(choosing)
    for graph in (choosing, gm):
        graph.get_buffer("precision_bias")[0, choice] = torch.inf
    run = steps(model, padding)
    for call, actual, expected in zip(run, *(run_steps(each, model, run) for each in (gm, choosing)), strict=True):
        pairs = (at_tokens(outputs, call, 2 * NUM_LAYERS) for outputs in (actual, expected))
        torch.testing.assert_close(*pairs, rtol=0, atol=1e-4)


def _reading_a_table() -> fx.GraphModule:
    """Whose middle block adds its table of cosines to the hidden state."""
    dense = wide_outlined("llama")
    block = dense.get_submodule("blocks.1")
    assert isinstance(block, fx.GraphModule)
    graph, (hidden, *cache) = copy_graph(block)
    cosines, _ = (node for node in graph.find_nodes(op="placeholder")[1:] if node.meta["val"].dim() == 3)
    added = graph.call_function(torch.ops.aten.add.Tensor, (hidden, graph.call_function(torch.sum, (cosines,))))
    graph.output((added, *cache))
    return with_blocks(dense, {1: fx.GraphModule(block, graph)})


_VERSIONS = r"^a cache is not handed on as it is \(blocks choose between more than two versions\)$"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            lambda: outlined_graph("llama"),
            r"^heads of 8 features, where the operator takes multiples of 16$",
            id="heads of 8",
        ),
        pytest.param(_reading_a_table, r"sum.* reads a rotary table or the attention mask$", id="a table is read"),
        pytest.param(lambda: _choosing(3), _VERSIONS, id="three versions"),
        pytest.param(lambda: _choosing(2, for_tokens=True), _VERSIONS, id="tokens that choose for themselves"),
    ],
)
def test_says_why_it_leaves_a_graph_alone(make: Callable[[], fx.GraphModule], reason: str) -> None:
    with pytest.raises(NotFusedError, match=reason):
        fused(make())
