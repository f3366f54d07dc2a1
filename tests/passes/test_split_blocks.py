import pytest
import torch
from torch import fx
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from modcompile.errors import UnsupportedModelError
from modcompile.passes import harden_gates, insert_depth_gates, lower_gates
from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from modcompile.passes.split_blocks import split_blocks
from modcompile.routed_graph import trace_outlined
from modcompile.routers import SoftGate
from modcompile.tracing import find_layers
from tests.model_inputs import Padding, kernel_atol, make_inputs, run_model
from tests.passes.forced_routing import ForcedRouter, force
from tests.tiny_graphs import outlined_graph
from tests.tiny_models import VOCAB_SIZE

_MLP_PRODUCTS = {"llama": 3, "mistral": 3, "qwen2": 3, "opt": 2, "gpt2": 2}


@pytest.fixture(scope="module")
def split(architecture: str) -> fx.GraphModule:
    return split_blocks(outlined_graph(architecture))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("batch", "length", "past_length"), [(1, 1, 0), (2, 1, 5), (3, 4, 9)])
@torch.no_grad()
def test_keeps_every_output(
    architecture: str,
    split: fx.GraphModule,
    model: PreTrainedModel,
    batch: int,
    length: int,
    past_length: int,
    padding: Padding,
) -> None:
    inputs = make_inputs(model, batch, length, past_length, padding)
    torch.testing.assert_close(split(*inputs.flat), outlined_graph(architecture)(*inputs.flat), rtol=0, atol=0)


def test_every_other_block_is_an_mlp(architecture: str, split: fx.GraphModule, model: PreTrainedModel) -> None:
    calls = block_calls(split.graph)
    assert [str(call.target) for call in calls] == [f"blocks.{index}" for index in range(6)]
    for call in calls[1::2]:
        mlp = split.get_submodule(str(call.target))
        assert isinstance(mlp, fx.GraphModule)
        assert len(call.args) == 1
        assert len(find_linears(mlp.graph)) == _MLP_PRODUCTS[architecture]
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in split.parameters()} <= own


@torch.no_grad()
def test_a_gate_skips_the_one_without_the_other(split: fx.GraphModule, model: PreTrainedModel) -> None:
    """Beside the model with hooks of PyTorch that take out what its MLPs add."""
    routers = {index: ForcedRouter() for index in range(6)}
    gm = lower_gates(harden_gates(insert_depth_gates(split, routers, SoftGate())))
    inputs = make_inputs(model, 2, 5, 3)
    open_ = torch.ones(2, 5, 1, dtype=torch.bool)
    force(gm, {index: open_ if index % 2 == 0 else ~open_ for index in range(6)})
    handles = []
    for layer in find_layers(model):
        (mlp,) = [module for name, module in layer.named_modules() if name in ("mlp.down_proj", "fc2", "mlp.c_proj")]
        handles.append(mlp.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
    try:
        expected = run_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    actual = gm(*inputs.flat)[: len(expected)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=kernel_atol(model, 5))


def test_refuses_attention_and_mlp_side_by_side() -> None:
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB_SIZE,
        use_parallel_residual=True,
    )
    outlined = trace_outlined(GPTNeoXForCausalLM(config).eval())
    with pytest.raises(UnsupportedModelError, match=r"^blocks\.0 can't be split: "):
        split_blocks(outlined)
