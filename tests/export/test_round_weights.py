import pytest
import torch
from datasets import Dataset

from modcompile.export.export_config import WeightRounding
from modcompile.export.round_weights import calibrated, round_for_text, round_weights
from modcompile.gptq_blocks import quantize_blocks
from modcompile.quantization import quantize
from modcompile.routed_graph import trace_outlined
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("rounding", [WeightRounding(4, 16, symmetric=False), WeightRounding(8, 64, symmetric=True)])
def test_leaves_in_the_model_what_the_codes_stand_for(architecture: str, rounding: WeightRounding) -> None:
    """Rounded row by row of the output features, GPT-2's [in, out] weights too; all else stays."""
    model, original = tiny_model(architecture), tiny_model(architecture)
    codes = round_weights(trace_outlined(model), rounding=rounding)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rounded = {names[id(weight)]: packed for weight, packed in codes.items()}
    assert len(rounded) > 3 * 4
    for name, before in original.named_parameters():
        after = model.get_parameter(name)
        if name not in rounded:
            assert torch.equal(after, before)
            continue
        is_transposed = architecture == "gpt2" and name.startswith("transformer.h.")
        wanted = before.detach().T if is_transposed else before.detach()
        expected = quantize(wanted, rounding.num_bits, rounding.group_size, symmetric=rounding.symmetric)
        dense = expected.dequantize(wanted.shape[1])
        assert torch.equal(after, dense.T if is_transposed else dense)
        assert torch.equal(rounded[name].dequantize(wanted.shape[1]), dense)


def test_rounds_in_the_modules_it_is_given_alone() -> None:
    model, original = tiny_model("qwen2"), tiny_model("qwen2")
    gm = trace_outlined(model)
    ends = [gm.get_submodule(name) for name in ("prologue", "epilogue")]
    round_weights(*ends, rounding=WeightRounding(8, 32, symmetric=True))
    changed = {
        name for name, before in original.named_parameters() if not torch.equal(model.get_parameter(name), before)
    }
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_rounds_for_a_text_what_is_multiplied_by_and_the_rest_to_nearest(
    architecture: str, random_text: Dataset
) -> None:
    model, original = tiny_model(architecture), tiny_model(architecture)
    rounding, nearest = WeightRounding(4, 32, symmetric=True), WeightRounding(4, 16, symmetric=False)
    for_text = round_for_text(model, rounding, random_text)
    for name, before in original.named_parameters():
        assert torch.equal(model.get_parameter(name), before)
    codes = round_weights(trace_outlined(model), rounding=nearest, rounded=for_text)
    expected = quantize_blocks(original, calibrated(rounding), random_text, with_head=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(weight)] for weight in for_text} == expected.keys()
    for weight, packed in codes.items():
        name = names[id(weight)]
        is_transposed = architecture == "gpt2" and name.startswith("transformer.h.")
        after = weight.detach().T if is_transposed else weight.detach()
        if name in expected:
            assert torch.equal(after, expected[name].dequantize(4))
            assert packed.group_size == 32
        else:
            dense = original.get_parameter(name).detach()
            assert torch.equal(after, quantize(dense, 4, 16, symmetric=False).dequantize(dense.shape[1]))
            assert packed.group_size == 16
    looked_up = names[id(model.get_input_embeddings().weight)]
    assert (looked_up in expected) == model.config.tie_word_embeddings
