from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from modcompile.passes import drop_guards, fuse_operators, harden_gates, insert_depth_gates, lower_gates, outline_blocks
from modcompile.passes.compact_tokens import compact_tokens
from modcompile.passes.find_linears import find_linears
from modcompile.passes.masked_block import masked_block
from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.open_tokens import GATHER_OPEN, OPEN_TOKENS
from modcompile.routers import SoftGate
from modcompile.tracing import trace_causal_lm
from tests.model_inputs import make_inputs
from tests.passes.forced_routing import ForcedRouter, force
from tests.passes.routing_cases import ROUTED_LAYERS, RoutingCase, routing_cases
from tests.passes.toy_block import toy_block
from tests.passes.traced import BATCH, PAST, TOKENS, Run, calls, random, traced
from tests.tiny_graphs import hard_graph, random_adapters
from tests.tiny_models import VOCAB_SIZE

_BLOCK_PRODUCTS = {"llama": 7, "mistral": 7, "qwen2": 7, "opt": 6, "gpt2": 4}
_FOR_ALL_TOKENS = {"gpt2": 1}
"""Projections of queries, keys and values; three but where they are one."""


@pytest.fixture(scope="module")
def forced(architecture: str) -> fx.GraphModule:
    """A lowered graph whose routing masks the cases set."""
    return lower_gates(hard_graph(architecture, {layer: ForcedRouter() for layer in ROUTED_LAYERS}))


@pytest.fixture(scope="module")
def compact(forced: fx.GraphModule) -> fx.GraphModule:
    return compact_tokens(fuse_operators(forced))


@pytest.fixture(scope="module")
def with_adapters(architecture: str) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The same with a skip path: hard, and compact."""
    adapters = random_adapters(ROUTED_LAYERS)
    hard = hard_graph(architecture, {layer: ForcedRouter() for layer in ROUTED_LAYERS}, adapters=adapters)
    return hard, compact_tokens(fuse_operators(lower_gates(hard)))


@given(case=routing_cases(), share=st.sampled_from([None, 0.0, 1.0]))
@torch.no_grad()
def test_keeps_every_output(
    forced: fx.GraphModule,
    compact: fx.GraphModule,
    model: PreTrainedModel,
    case: RoutingCase,
    share: float | None,
) -> None:
    """With all, none or some tokens open, which are then padding too; prompts and decode steps."""
    inputs, is_open = case.inputs(model), case.is_open()
    if share is not None:
        is_open = {layer: torch.full_like(mask, bool(share)) for layer, mask in is_open.items()}
    for gm in (forced, compact):
        force(gm, is_open)
    expected, actual = inputs.at_tokens(forced(*inputs.flat)), inputs.at_tokens(compact(*inputs.flat))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@given(case=routing_cases(), share=st.sampled_from([None, 0.0, 1.0]))
@torch.no_grad()
def test_closed_tokens_go_through_the_adapter(
    with_adapters: tuple[fx.GraphModule, fx.GraphModule],
    model: PreTrainedModel,
    case: RoutingCase,
    share: float | None,
) -> None:
    inputs, is_open = case.inputs(model), case.is_open()
    if share is not None:
        is_open = {layer: torch.full_like(mask, bool(share)) for layer, mask in is_open.items()}
    for gm in with_adapters:
        force(gm, is_open)
    expected, actual = (inputs.at_tokens(gm(*inputs.flat)) for gm in with_adapters)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def rows_multiplied(gm: fx.GraphModule, run: Callable[[], object]) -> list[int]:
    """How many rows the products with weights have, in the order of execution."""
    rows: list[int] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n in products:
                assert isinstance(result, torch.Tensor)
                rows.append(result.numel() // result.shape[-1])
            return result

    products = {use.node for use in find_linears(gm.graph)}
    recorder = Recorder(gm)
    gm.forward = recorder.run
    run()
    del gm.forward
    return rows


@torch.no_grad()
def test_multiplies_the_open_tokens_only_once_attention_is_computed(
    architecture: str, compact: fx.GraphModule, model: PreTrainedModel
) -> None:
    is_open = torch.tensor([[True, False, False, True], [False, False, True, False]]).unsqueeze(-1)
    force(compact, dict.fromkeys(ROUTED_LAYERS, is_open))
    branch = compact.get_submodule("blocks.2.then_branch")
    assert isinstance(branch, fx.GraphModule)
    inputs = make_inputs(model, 2, 4, 3)
    of_all = _FOR_ALL_TOKENS.get(architecture, 3)
    rows = rows_multiplied(branch, lambda: compact(*inputs.flat))
    assert rows == [8] * of_all + [3] * (_BLOCK_PRODUCTS[architecture] - of_all)


def test_counts_the_open_tokens_once_a_block_and_takes_two_tensors_of_them(compact: fx.GraphModule) -> None:
    """What attention gives, and the hidden state."""
    counted = {name: calls(each) for name, each in named_graphs(compact) if OPEN_TOKENS in targets(each)}
    assert list(counted) == [f"blocks.{layer}.then_branch" for layer in ROUTED_LAYERS]
    assert all(count["open_tokens"] == 1 and count["gather_open"] == 2 for count in counted.values())


def named_graphs(gm: fx.GraphModule) -> Iterable[tuple[str, fx.GraphModule]]:
    return ((name, module) for name, module in gm.named_modules() if isinstance(module, fx.GraphModule))


def targets(gm: fx.GraphModule) -> set[object]:
    return {node.target for node in gm.graph.nodes}


def test_shares_its_parameters(forced: fx.GraphModule, compact: fx.GraphModule) -> None:
    own = {id(parameter) for parameter in forced.parameters()}
    assert {id(parameter) for parameter in compact.parameters()} <= own


@torch.no_grad()
def test_norms_of_queries_and_keys_are_for_all_tokens() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB_SIZE,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).eval()
    outlined = outline_blocks(drop_guards(trace_causal_lm(model)))
    gm = lower_gates(harden_gates(insert_depth_gates(outlined, {1: ForcedRouter()}, SoftGate())))
    compact = compact_tokens(fuse_operators(gm))
    assert any(GATHER_OPEN in targets(each) for each in all_graphs(compact))
    inputs = make_inputs(model, 2, 5, 3, "left")
    for each in (gm, compact):
        force(each, {1: torch.arange(10).view(2, 5, 1) % 3 == 0})
    expected, actual = inputs.at_tokens(gm(*inputs.flat)), inputs.at_tokens(compact(*inputs.flat))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


HIDDEN, PAST_KEY = random(BATCH, TOKENS, 8), random(BATCH, 1, PAST, 8, seed=1)
IS_OPEN = random(BATCH, TOKENS, 1, seed=4) > 0
_Change = Callable[[Run, torch.Tensor, torch.Tensor], torch.Tensor]


def block_of(change: _Change) -> fx.GraphModule:
    """A block whose hidden state is what `change` makes of it and of its keys `[B, 1, P + T, 8]`."""

    def block(self: Run, hidden: torch.Tensor, past_key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        key = torch.cat([past_key, hidden.unsqueeze(1)], 2)
        return change(self, hidden, key), key

    return masked_block(traced(Run(block, weight=random(8, 8, seed=2)), HIDDEN, PAST_KEY))


@pytest.mark.parametrize(
    ("change", "gathers"),
    [
        pytest.param(lambda self, hidden, key: functional.linear(hidden, self.weight).relu(), 1, id="of one tensor"),
        pytest.param(
            lambda self, hidden, key: functional.linear(hidden + key.mean(2), self.weight), 1, id="a mean over tokens"
        ),
        pytest.param(
            lambda self, hidden, key: functional.linear(hidden, self.weight).cumsum(1) @ self.weight, 1, id="a sum"
        ),
        pytest.param(
            lambda self, hidden, key: functional.linear(hidden, self.weight).split(4, -1)[1].repeat(1, 1, 2) + hidden,
            0,
            id="no product behind what is not known",
        ),
        pytest.param(
            lambda self, hidden, key: torch.cat([*functional.linear(hidden, self.weight).softmax(1).split(4, 2)], 2),
            0,
            id="softmax over tokens",
        ),
        pytest.param(
            lambda self, hidden, key: (
                functional.silu((gate := functional.linear(hidden, self.weight).chunk(2, -1))[0])
                * gate[1]
                @ self.weight[:4]
            ),
            0,
            id="weights that are computed",
        ),
        pytest.param(
            lambda self, hidden, key: (
                functional.linear(hidden, self.weight)
                * functional.linear(hidden, self.weight).pow(2).mean(-1, keepdim=True)
            ),
            1,
            id="a mean over features",
        ),
        pytest.param(
            lambda self, hidden, key: functional.linear(functional.layer_norm(hidden, hidden.shape[2:]), self.weight),
            1,
            id="a norm without weights",
        ),
    ],
)
@torch.no_grad()
def test_computes_of_the_open_tokens_what_comes_after_all_that_mixes_tokens(change: _Change, gathers: int) -> None:
    masked = block_of(change)
    compact = compact_tokens(masked)
    assert calls(compact)["gather_open"] == gathers
    for is_open in (IS_OPEN, torch.zeros_like(IS_OPEN), torch.ones_like(IS_OPEN)):
        expected = masked(HIDDEN, PAST_KEY, is_open)
        torch.testing.assert_close(compact(HIDDEN, PAST_KEY, is_open), expected, rtol=0, atol=1e-5)


def test_leaves_a_block_without_products() -> None:
    assert not any(GATHER_OPEN in targets(each) for each in all_graphs(compact_tokens(masked_block(toy_block()))))
