import pytest
import torch
from torch import fx, nn

from modcompile.passes import lower_gates
from modcompile.passes.code_key import code_key
from tests.tiny_graphs import hard_graph, random_routers


def _linear_graph(name: str = "x", size: int = 4, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder(name)
    graph.output((graph.call_module("layer", (x,)), graph.call_function(torch.mul, (x, graph.get_attr("scale")))))
    return fx.GraphModule({"layer": nn.Linear(size, size, dtype=dtype), "scale": torch.randn(size, dtype=dtype)}, graph)


def _binary_graph(second_is_input: bool) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.add, (x, x if second_is_input else 0)),))
    return fx.GraphModule({}, graph)


def test_blocks_of_one_model_run_the_same_code(outlined: fx.GraphModule) -> None:
    keys = {code_key(outlined.get_submodule(f"blocks.{index}")) for index in range(3)}
    assert len(keys) == 1
    assert keys.isdisjoint({code_key(outlined.get_submodule(name)) for name in ("prologue", "epilogue")})


def test_values_of_parameters_and_names_of_nodes_do_not_count() -> None:
    assert code_key(_linear_graph("x")) == code_key(_linear_graph("y"))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(_linear_graph(size=5), id="shape"),
        pytest.param(_linear_graph(dtype=torch.float64), id="dtype"),
        pytest.param(_binary_graph(second_is_input=True), id="graph"),
        pytest.param(nn.Linear(4, 4), id="module"),
    ],
)
def test_other_code_has_another_key(other: nn.Module) -> None:
    assert code_key(_linear_graph()) != code_key(other)


def test_an_input_is_not_the_number_of_its_position() -> None:
    assert code_key(_binary_graph(second_is_input=True)) != code_key(_binary_graph(second_is_input=False))


def test_settings_of_a_module_count() -> None:
    assert code_key(nn.LayerNorm(4)) == code_key(nn.LayerNorm(4))
    assert code_key(nn.LayerNorm(4)) != code_key(nn.LayerNorm(4, eps=1e-3))
    assert code_key(nn.LayerNorm(4)) != code_key(nn.LayerNorm(4, elementwise_affine=False))


def test_branches_of_a_cond_count() -> None:
    lowered = lower_gates(hard_graph("llama", random_routers([0, 2])))
    first, second = (lowered.get_submodule(f"blocks.{layer}") for layer in (0, 2))
    assert code_key(first) == code_key(second)
    assert isinstance(second, fx.GraphModule)
    children = {**dict(second.named_children()), "then_branch": second.get_submodule("else_branch")}
    assert code_key(first) != code_key(fx.GraphModule(children, second.graph))
