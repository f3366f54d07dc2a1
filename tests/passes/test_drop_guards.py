import pytest
import torch
from torch import fx
from transformers import PreTrainedModel

from modcompile.passes import drop_guards
from tests.model_inputs import Padding, make_inputs
from tests.tiny_graphs import traced_graph

_GUARDS = {"_guards_fn", "aten._assert_tensor_metadata.default"}


@pytest.fixture(scope="module")
def traced(architecture: str) -> fx.GraphModule:
    return traced_graph(architecture)


def _targets(gm: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.nodes}


def test_removes_guards_and_slices_that_take_everything(traced: fx.GraphModule) -> None:
    gm = drop_guards(traced)
    assert _targets(traced) & _GUARDS
    assert not _targets(gm) & _GUARDS
    assert not [node for node in gm.graph.nodes if node.args[2:] == (0, 2**63 - 1)]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_keeps_every_output(model: PreTrainedModel, traced: fx.GraphModule, padding: Padding) -> None:
    inputs = make_inputs(model, 2, 3, 4, padding)
    with torch.no_grad():
        logits, presents = traced(*inputs.tokens, inputs.past)
        actual = drop_guards(traced)(*inputs.flat)
    torch.testing.assert_close(actual, (logits, *(t for pair in presents for t in pair)), rtol=0, atol=0)


def test_shares_parameters(model: PreTrainedModel, traced: fx.GraphModule) -> None:
    own = {parameter.data_ptr() for parameter in model.parameters()}
    shared = dict(drop_guards(traced).named_parameters())
    assert {parameter.data_ptr() for parameter in shared.values()} == own
    assert all(name.startswith("model.") for name in shared)


def test_runs_under_autocast(model: PreTrainedModel, flat: fx.GraphModule) -> None:
    inputs = make_inputs(model, 2, 3, 4, "left")
    with torch.no_grad():
        expected = flat(*inputs.flat)[0]
        with torch.autocast("cpu", torch.bfloat16):
            logits = flat(*inputs.flat)[0]
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), expected, dim=-1).min() > 0.99


def test_returns_flat_outputs(model: PreTrainedModel, flat: fx.GraphModule) -> None:
    inputs = make_inputs(model, 1, 1, 0)
    outputs = flat(*inputs.flat)
    assert len(outputs) == 1 + 2 * model.config.num_hidden_layers
