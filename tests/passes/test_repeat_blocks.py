import pytest
import torch
from torch import fx, nn
from transformers import PreTrainedModel

from modcompile.errors import UnsupportedModelError
from modcompile.passes import drop_guards, outline_blocks, repeat_blocks
from modcompile.passes.outlined_form import block_calls
from modcompile.tracing import find_layers, trace_causal_lm, truncated
from tests.model_inputs import Padding, make_inputs, run_model
from tests.tiny_graphs import outlined_graph
from tests.tiny_models import tiny_model


def _outline_two(model: PreTrainedModel, *, use_cache: bool = True) -> fx.GraphModule:
    with truncated(find_layers(model), 2):
        return outline_blocks(drop_guards(trace_causal_lm(model, use_cache=use_cache)))


@pytest.fixture(scope="module")
def repeated(model: PreTrainedModel) -> fx.GraphModule:
    return repeat_blocks(_outline_two(model), list(find_layers(model)))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("batch", "length", "past_length"), [(1, 1, 0), (1, 7, 0), (2, 1, 5), (3, 4, 9)])
def test_equals_the_graph_traced_whole(
    model: PreTrainedModel,
    outlined: fx.GraphModule,
    repeated: fx.GraphModule,
    batch: int,
    length: int,
    past_length: int,
    padding: Padding,
) -> None:
    inputs = make_inputs(model, batch, length, past_length, padding)
    with torch.no_grad():
        torch.testing.assert_close(repeated(*inputs.flat), outlined(*inputs.flat), rtol=0, atol=0)


def test_equals_the_graph_traced_whole_without_cache(architecture: str, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 0, "left")
    repeated = repeat_blocks(_outline_two(model, use_cache=False), list(find_layers(model)))
    with torch.no_grad():
        expected = outlined_graph(architecture, use_cache=False)(*inputs.tokens)
        torch.testing.assert_close(repeated(*inputs.tokens), expected, rtol=0, atol=0)


def test_holds_all_parameters_of_the_model(model: PreTrainedModel, repeated: fx.GraphModule) -> None:
    held = {id(parameter) for parameter in repeated.parameters()}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_stamps_out_more_than_ten_layers_in_order() -> None:
    model = tiny_model("llama", num_layers=12)
    repeated = repeat_blocks(_outline_two(model), list(find_layers(model)))
    assert [call.target for call in block_calls(repeated.graph)] == [f"blocks.{index}" for index in range(12)]
    inputs = make_inputs(model, 2, 3, 4, "left")
    with torch.no_grad():
        torch.testing.assert_close(repeated(*inputs.flat), run_model(model, inputs), rtol=0, atol=0)


def test_refuses_traced_blocks_that_differ() -> None:
    model = tiny_model("llama")
    layers = find_layers(model)
    layers[1].set_submodule("mlp.act_fn", nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"^blocks\.0 and blocks\.1 differ"):
        repeat_blocks(_outline_two(model), list(layers))


@pytest.mark.parametrize("other", [nn.Identity(), nn.Linear(32, 64, bias=False)], ids=["missing", "another shape"])
def test_refuses_a_layer_without_a_parameter_of_the_block(other: nn.Module) -> None:
    model = tiny_model("llama")
    outlined, layers = _outline_two(model), find_layers(model)
    layers[2].set_submodule("mlp.up_proj", other)
    expected = r"^blocks\.2 has no parameter mlp\.up_proj\.weight of shape \(48, 32\)$"
    with pytest.raises(UnsupportedModelError, match=expected):
        repeat_blocks(outlined, list(layers))
