import torch

from modcompile.precision_choices import chosen_bits
from modcompile.precision_output import PrecisionCausalLMOutput

_TOKENS = torch.ones(2, 3).bool()


def test_a_sequence_chooses_for_all_of_its_tokens() -> None:
    weights = torch.tensor([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])
    output = PrecisionCausalLMOutput(precision_weights=(weights,), gates={}, tokens=_TOKENS)
    (bits,) = chosen_bits(output, [2, 4, 16])
    assert bits.tolist() == [[4] * 3, [16] * 3]


def test_a_closed_gate_is_no_bits_in_its_layer() -> None:
    by_token = torch.tensor([[[1.0, 0], [0, 1], [1, 0]], [[0, 1], [0, 1], [1, 0]]])
    of_sequence = torch.tensor([[[1.0, 0]], [[0, 1]]])
    gate = torch.tensor([[1.0, 0, 0.6], [0, 0.4, 1]]).unsqueeze(-1)
    output = PrecisionCausalLMOutput(precision_weights=(of_sequence, by_token), gates={1: gate}, tokens=_TOKENS)
    first, second = chosen_bits(output, [4, 8])
    assert first.tolist() == [[4, 4, 4], [8, 8, 8]]
    assert second.tolist() == [[4, 0, 4], [0, 0, 4]]
