import copy

import torch
from torch import fx

from modcompile.passes.retarget_device import retarget_device
from tests.model_inputs import make_inputs
from tests.tiny_graphs import outlined_graph, shared_model

_CPU, _META = torch.device("cpu"), torch.device("meta")


def _devices(gm: fx.GraphModule) -> set[torch.device]:
    """Those that the graph, and the graphs inside, name."""
    nodes = [node for module in gm.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes]
    values = [value for node in nodes for value in (*node.args, *node.kwargs.values())]
    return {value for value in values if isinstance(value, torch.device)}


def test_retargets_the_graph_and_those_inside(architecture: str) -> None:
    gm = copy.deepcopy(outlined_graph(architecture))
    assert _devices(gm) == {_CPU}
    assert retarget_device(gm, _META)
    assert _devices(gm) == {_META}


def test_runs_on_the_other_device_once_its_parameters_are_there(architecture: str) -> None:
    gm = copy.deepcopy(outlined_graph(architecture))
    retarget_device(gm, _META)
    inputs = make_inputs(shared_model(architecture), 2, 3, 4, "left")
    outputs = gm.to(_META)(*(tensor.to(_META) for tensor in inputs.flat))
    assert {output.device for output in outputs} == {_META}


def test_idempotent() -> None:
    gm = copy.deepcopy(outlined_graph("llama"))
    assert retarget_device(gm, _META)
    assert not retarget_device(gm, _META)
