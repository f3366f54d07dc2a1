import pytest
import torch
from torch import fx, nn

from modcompile.passes.extract_subgraph import extract_subgraph, find_inputs, get_attribute, is_symbolic_int

_FREE = torch.export.Dim.AUTO


class _Reshaping(nn.Module):
    """Flattens `x [B, T, 4]` by its own sizes, twice, and `y [S]` by those of x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, _ = x.shape
        hidden = self.layer(x)
        return hidden.view(batch * length, 6), y.expand(length, y.shape[0])


@pytest.fixture(scope="module")
def gm() -> fx.GraphModule:
    shapes = ({0: _FREE, 1: _FREE}, {0: _FREE})
    with torch.no_grad():
        ep = torch.export.export(_Reshaping(), (torch.randn(2, 3, 4), torch.randn(5)), dynamic_shapes=shapes)
    module = ep.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _tensor_nodes(gm: fx.GraphModule, *names: str) -> list[fx.Node]:
    """The calls of the aten operators of these names, in order."""
    operators = [node for node in gm.graph.nodes if node.op == "call_function" and not is_symbolic_int(node)]
    return [node for node in operators if node.target.overloadpacket.__name__ in names]


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def test_inputs_are_tensors_without_parameters_and_ints(gm: fx.GraphModule) -> None:
    x, _ = _placeholders(gm)
    assert find_inputs(_tensor_nodes(gm, "linear", "view")) == [x]


def test_an_int_brings_the_tensor_it_is_a_size_of_when_no_input_has_that_size(gm: fx.GraphModule) -> None:
    x, y = _placeholders(gm)
    assert find_inputs(_tensor_nodes(gm, "expand")) == [y, x]


def test_subgraph_equals_the_part_at_other_sizes(gm: fx.GraphModule) -> None:
    x, y = _placeholders(gm)
    nodes = _tensor_nodes(gm, "linear", "view")
    subgraph = extract_subgraph(gm, nodes, [x], [nodes[-1]])
    tensor = torch.randn(5, 7, 4)
    torch.testing.assert_close(subgraph(tensor)[0], gm(tensor, torch.randn(2))[0], rtol=0, atol=0)
    nodes = _tensor_nodes(gm, "expand")
    subgraph = extract_subgraph(gm, nodes, [y, x], [nodes[-1]])
    assert subgraph(torch.randn(2), tensor)[0].shape == (7, 2)


def test_takes_tensors_only(gm: fx.GraphModule) -> None:
    x, _ = _placeholders(gm)
    nodes = _tensor_nodes(gm, "linear", "view")
    (view,) = _tensor_nodes(gm, "view")
    first, second = _tensor_nodes(gm, "linear")
    subgraph = extract_subgraph(gm, [view], find_inputs([view]), [view])
    assert find_inputs([view]) == [second]
    assert [node.name for node in subgraph.graph.find_nodes(op="placeholder")] == [second.name]
    assert extract_subgraph(gm, nodes, [x], [first, view])(torch.randn(1, 1, 4))[0].shape == (1, 1, 6)


def test_shares_parameters_under_names_without_the_prefix(gm: fx.GraphModule) -> None:
    x, _ = _placeholders(gm)
    nodes = _tensor_nodes(gm, "linear")
    subgraph = extract_subgraph(gm, nodes, [x], [nodes[-1]], prefix="layer.")
    assert set(subgraph.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert get_attribute(subgraph, "1.weight") is get_attribute(gm, "layer.1.weight")


def test_leaves_out_what_no_output_needs(gm: fx.GraphModule) -> None:
    x, _ = _placeholders(gm)
    nodes = _tensor_nodes(gm, "linear", "view")
    subgraph = extract_subgraph(gm, nodes, [x], [nodes[0]], prefix="layer.")
    assert set(subgraph.state_dict()) == {"0.weight", "0.bias"}
    assert not subgraph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)


def test_refuses_a_tensor_that_is_neither_inside_nor_an_input(gm: fx.GraphModule) -> None:
    nodes = _tensor_nodes(gm, "linear")
    with pytest.raises(ValueError, match=r"^x is neither inside the subgraph nor one of its inputs$"):
        extract_subgraph(gm, nodes, [], [nodes[-1]])
