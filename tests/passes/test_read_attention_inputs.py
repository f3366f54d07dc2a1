from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from modcompile.passes.outlined_form import called_modules, copy_graph
from modcompile.passes.read_attention_inputs import ALL, AttentionInputs, NotFusedError, read_attention_inputs
from tests.tiny_graphs import outlined_graph
from tests.tiny_models import SLIDING_WINDOW

_POSITIONS = 40


def _outputs(gm: fx.GraphModule) -> list[tuple[torch.dtype, int]]:
    """Of the prologue: dtypes and ranks."""
    prologue = gm.get_submodule("prologue")
    assert isinstance(prologue, fx.GraphModule)
    (output,) = prologue.graph.find_nodes(op="output")
    return [(node.meta["val"].dtype, node.meta["val"].dim()) for node in output.args[0]]


def _read(architecture: str) -> tuple[AttentionInputs, list[tuple[torch.dtype, int]]]:
    gm = outlined_graph(architecture)
    return read_attention_inputs(gm, _POSITIONS), _outputs(gm)


@pytest.mark.parametrize(
    ("architecture", "window"),
    [("llama", ALL), ("mistral", SLIDING_WINDOW), ("qwen2", ALL), ("gpt2", ALL), ("opt", ALL)],
)
def test_finds_the_mask_and_how_far_it_reaches(architecture: str, window: int) -> None:
    shared, outputs = _read(architecture)
    assert shared.windows == {index: window for index, kind in enumerate(outputs) if kind == (torch.bool, 4)}
    assert len(shared.windows) == 1


def test_a_window_as_long_as_a_sequence_is_none() -> None:
    gm = outlined_graph("mistral")
    assert list(read_attention_inputs(gm, SLIDING_WINDOW).windows.values()) == [ALL]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_reads_half_a_row_of_each_table_for_every_position(architecture: str) -> None:
    shared, _ = _read(architecture)
    angles = torch.arange(_POSITIONS)[:, None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = shared.tables.values()
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_embedded_positions_have_no_tables(architecture: str) -> None:
    assert _read(architecture)[0].tables == {}


def _patched(change: Callable[[fx.Graph, list[fx.Node]], fx.Node], kind: tuple[torch.dtype, int]) -> fx.GraphModule:
    """The tiny LLaMA whose prologue returns another value in the place of the last of a kind."""
    gm = outlined_graph("llama")
    prologue = gm.get_submodule("prologue")
    assert isinstance(prologue, fx.GraphModule)
    graph, returned = copy_graph(prologue)
    outputs = list(returned)
    *_, index = (index for index, each in enumerate(_outputs(gm)) if each == kind)
    changed = change(graph, [*graph.find_nodes(op="placeholder"), outputs[index]])
    changed.meta = dict(outputs[index].meta)
    outputs[index] = changed
    graph.output(tuple(outputs))
    whole, results = copy_graph(gm)
    whole.output(results)
    modules: dict[str, nn.Module] = called_modules(gm) | {"prologue": fx.GraphModule(prologue, graph)}
    return fx.GraphModule(modules, whole)


_TABLE, _MASK = (torch.float32, 3), (torch.bool, 4)


def _summed(graph: fx.Graph, values: list[fx.Node]) -> fx.Node:
    return graph.call_function(torch.ops.aten.cumsum.default, (values[-1], 1))


def _of_relative_positions(graph: fx.Graph, values: list[fx.Node]) -> fx.Node:
    """Scaled for the longest sequence of the call."""
    largest = graph.call_function(torch.ops.aten.max.default, (values[2],))
    return graph.call_function(torch.ops.aten.mul.Tensor, (values[-1], largest))


def _inverted(graph: fx.Graph, values: list[fx.Node]) -> fx.Node:
    return graph.call_function(torch.ops.aten.bitwise_not.default, (values[-1],))


def _of_another_row(graph: fx.Graph, values: list[fx.Node]) -> fx.Node:
    """Every row sees what the last row does."""
    row = graph.call_function(torch.ops.aten.slice.Tensor, (values[-1], 0, -1, 2**62))
    return graph.call_function(torch.ops.aten.expand_as.default, (row, values[-1]))


@pytest.mark.parametrize("change", [_summed, _of_relative_positions])
def test_refuses_tables_that_depend_on_other_tokens(change: Callable[[fx.Graph, list[fx.Node]], fx.Node]) -> None:
    gm = _patched(change, _TABLE)
    with pytest.raises(NotFusedError, match=r"^its rotary tables depend on more than a token's own position$"):
        read_attention_inputs(gm, _POSITIONS)


@pytest.mark.parametrize("change", [_inverted, _of_another_row])
def test_refuses_masks_that_are_not_causal(change: Callable[[fx.Graph, list[fx.Node]], fx.Node]) -> None:
    gm = _patched(change, _MASK)
    with pytest.raises(NotFusedError, match=r"^its attention mask is not that of causal attention"):
        read_attention_inputs(gm, _POSITIONS)


def test_leaves_the_graph_alone() -> None:
    gm = outlined_graph("llama")
    before = gm.code, gm.get_submodule("prologue").code
    read_attention_inputs(gm, _POSITIONS)
    assert (gm.code, gm.get_submodule("prologue").code) == before
