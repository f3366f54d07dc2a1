from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from transformers import (
    DynamicCache,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from modcompile.errors import UnsupportedModelError
from modcompile.tracing import (
    cache_shapes,
    eval_mode,
    find_layers,
    from_cache,
    layers_are_alike,
    to_cache,
    trace_causal_lm,
    truncated,
)
from tests.model_inputs import Padding, kernel_atol, make_inputs, run_model
from tests.tiny_graphs import flat_graph
from tests.tiny_models import HIDDEN_SIZE, VOCAB_SIZE, tiny_model


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("past_length", [0, 1, 8])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_trace_equals_the_model(
    model: PreTrainedModel, flat: fx.GraphModule, batch: int, length: int, past_length: int, padding: Padding
) -> None:
    inputs = make_inputs(model, batch, length, past_length, padding)
    with torch.no_grad():
        actual = flat(*inputs.flat)
    torch.testing.assert_close(actual, run_model(model, inputs), rtol=0, atol=kernel_atol(model, length))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 2), (2, 9)])
def test_trace_without_cache_equals_the_model(
    architecture: str, model: PreTrainedModel, batch: int, length: int, padding: Padding
) -> None:
    inputs = make_inputs(model, batch, length, 0, padding)
    with torch.no_grad():
        actual = flat_graph(architecture, use_cache=False)(*inputs.tokens)
    expected = run_model(model, inputs, use_cache=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=kernel_atol(model, length))


def test_trace_is_differentiable(architecture: str, model: PreTrainedModel) -> None:
    inputs = make_inputs(model, 2, 5, 0, "right")
    graph = flat_graph(architecture, use_cache=False)
    weight = next(find_layers(model).parameters())
    (actual,) = torch.autograd.grad(graph(*inputs.tokens)[0].square().sum(), weight)
    output = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids)
    (expected,) = torch.autograd.grad(output.logits.square().sum(), weight)
    torch.testing.assert_close(actual, expected)


def test_trace_leaves_the_model_in_its_mode() -> None:
    model = tiny_model("gpt2").train()
    trace_causal_lm(model)
    assert model.training
    assert model.transformer.h[0].attn.attn_dropout.training


def test_trace_refuses_an_encoder_decoder() -> None:
    config = T5Config(d_model=HIDDEN_SIZE, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCAB_SIZE)
    with pytest.raises(UnsupportedModelError, match=r"^T5ForConditionalGeneration does not run with a cache: "):
        trace_causal_lm(T5ForConditionalGeneration(config))


def test_trace_names_the_reason_when_export_fails() -> None:
    model = tiny_model("llama")

    def data_dependent(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].sum() > 0:
            raise RuntimeError

    model.get_input_embeddings().register_forward_pre_hook(data_dependent)
    with pytest.raises(UnsupportedModelError, match=r"^torch.export can't trace LlamaForCausalLM: .") as caught:
        trace_causal_lm(model)
    assert "\n" not in str(caught.value)


def test_cache_shapes_are_those_of_the_cache(model: PreTrainedModel) -> None:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = HIDDEN_SIZE // config.num_attention_heads
    assert cache_shapes(model) == [(heads, size, size)] * config.num_hidden_layers


def test_cache_holds_the_tensors_themselves() -> None:
    tensors = [(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 6)) for _ in range(2)]
    cache = to_cache(tensors)
    assert cache.get_seq_length() == 4
    for given, held in zip(tensors, from_cache(cache), strict=True):
        assert given[0] is held[0]
        assert given[1] is held[1]


def test_empty_cache_holds_nothing() -> None:
    assert from_cache(DynamicCache()) == []


def test_find_layers_finds_the_decoder(model: PreTrainedModel) -> None:
    layers = find_layers(model)
    assert len(layers) == model.config.num_hidden_layers
    assert sum(p.numel() for p in layers.parameters()) > sum(p.numel() for p in model.parameters()) / 2


def test_find_layers_refuses_a_model_without_a_stack() -> None:
    with pytest.raises(UnsupportedModelError, match="no list of two or more"):
        find_layers(tiny_model("llama", num_layers=1))


def test_layers_are_alike(model: PreTrainedModel) -> None:
    assert layers_are_alike(find_layers(model))


def test_layers_of_a_hybrid_are_not_alike() -> None:
    config = Qwen2Config(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    )
    assert not layers_are_alike(find_layers(Qwen2ForCausalLM(config)))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()), id="class"),
        pytest.param(lambda layer: setattr(layer.mlp, "up_proj", nn.Linear(HIDDEN_SIZE, 64, bias=False)), id="shape"),
        pytest.param(lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5), id="setting"),
    ],
)
def test_one_changed_layer_is_not_alike(change: Callable[[nn.Module], None]) -> None:
    layers = find_layers(tiny_model("llama"))
    change(layers[1])
    assert not layers_are_alike(layers)


def test_truncated_gives_the_layers_back() -> None:
    model = tiny_model("llama")
    layers = find_layers(model)
    before = list(layers)
    with truncated(layers, 2):
        assert list(layers) == before[:2]
    assert list(layers) == before
    with pytest.raises(KeyboardInterrupt), truncated(layers, 2):
        raise KeyboardInterrupt
    assert list(layers) == before


def test_truncated_model_runs_at_its_depth() -> None:
    model = tiny_model("llama")
    with truncated(find_layers(model), 2):
        assert len(cache_shapes(model)) == 2
    assert len(cache_shapes(model)) == 3


def test_eval_mode_gives_every_module_its_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]
