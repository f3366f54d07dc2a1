from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import fx
from transformers import AutoModelForCausalLM as AutoModel
from transformers import Gemma2Config, PhiConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from modcompile.passes import fuse_operators, lower_gates
from modcompile.routed_graph import trace_outlined
from tests.model_inputs import make_inputs
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.passes.traced import calls
from tests.tiny_graphs import hard_graph, outlined_graph, random_routers
from tests.tiny_models import HIDDEN_SIZE, INITIALIZER_RANGE, VOCAB_SIZE

_SPELLED_OUT = {"rsqrt", "neg", "scaled_dot_product_attention", "expand", "to"}


@pytest.fixture(scope="module")
def lowered(architecture: str) -> fx.GraphModule:
    """A lowered graph for all cases; each writes its routers and thresholds into it."""
    return lower_gates(hard_graph(architecture, random_routers(ROUTED_LAYERS)))


@pytest.fixture(scope="module")
def fused(lowered: fx.GraphModule) -> fx.GraphModule:
    """The fused one, with the same routers."""
    return fuse_operators(lowered)


def _of_blocks(gm: fx.GraphModule) -> list[Counter[str]]:
    blocks = [child for name, child in gm.named_modules() if name.split(".")[-1] == "block"]
    return [calls(block) for block in blocks if isinstance(block, fx.GraphModule)]


@given(case=routing_cases())
@torch.no_grad()
def test_keeps_every_output(
    lowered: fx.GraphModule, fused: fx.GraphModule, model: PreTrainedModel, case: RoutingCase
) -> None:
    inputs = case.inputs(model)
    case.load(lowered)
    fused.get_buffer("routing_threshold").copy_(lowered.get_buffer("routing_threshold"))
    actual, expected = fused(*inputs.flat), lowered(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(expected), rtol=0, atol=1e-5)


def test_fuses_inside_of_branches(fused: fx.GraphModule) -> None:
    blocks = _of_blocks(fused)
    assert len(blocks) == len(ROUTED_LAYERS)
    for operators in blocks:
        assert operators["Attention"] == 1
        assert not _SPELLED_OUT & operators.keys()


def test_a_block_of_llama_is_left_with_few_operators() -> None:
    gm = fuse_operators(outlined_graph("llama"))
    block = gm.get_submodule("blocks.1")
    assert isinstance(block, fx.GraphModule)
    assert calls(block) == {
        "rms_norm": 2, "linear": 7, "slice": 4, "RotaryEmbedding": 2, "Attention": 1,
        "add": 2, "silu": 1, "mul": 1,
    }  # fmt: skip


def test_shares_parameters_and_leaves_its_argument_alone(lowered: fx.GraphModule) -> None:
    before = [module.code for module in lowered.modules() if isinstance(module, fx.GraphModule)]
    result = fuse_operators(lowered)
    theirs = {id(tensor) for tensor in lowered.state_dict(keep_vars=True).values()}
    assert {id(tensor) for tensor in result.state_dict(keep_vars=True).values()} <= theirs
    assert [module.code for module in lowered.modules() if isinstance(module, fx.GraphModule)] == before


_SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            Qwen3Config(**_SHAPE, head_dim=8),
            {"rms_norm": 4, "RotaryEmbedding": 2, "Attention": 1},
            id="norms of heads",
        ),
        pytest.param(
            Gemma2Config(**_SHAPE | {"head_dim": 8, "attn_implementation": "eager"}),
            {"rms_norm": 4, "RotaryEmbedding": 2, "Attention": 0},
            id="attention with a soft cap",
        ),
        pytest.param(
            PhiConfig(**_SHAPE | {"partial_rotary_factor": 0.5}),
            {"layer_norm": 1, "RotaryEmbedding": 2, "Attention": 1},
            id="rotation of a part of each head",
        ),
    ],
)
@torch.no_grad()
def test_fuses_what_it_finds_in_other_models(config: PretrainedConfig, expected: dict[str, int]) -> None:
    torch.manual_seed(0)
    base = AutoModel.from_config(config).eval()
    dense = trace_outlined(base)
    gm = fuse_operators(dense)
    block = gm.get_submodule("blocks.1")
    assert isinstance(block, fx.GraphModule)
    operators = calls(block)
    assert {name: operators[name] for name in expected} == expected
    inputs = make_inputs(base, 3, 5, 4, "left", 0)
    actual, wanted = gm(*inputs.flat), dense(*inputs.flat)
    torch.testing.assert_close(inputs.at_tokens(actual), inputs.at_tokens(wanted), rtol=0, atol=1e-5)
