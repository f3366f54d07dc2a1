import torch

from modcompile.counted_bits import CountedBits


def test_the_first_call_is_the_prompt_and_the_others_are_new_tokens() -> None:
    bits = CountedBits()
    bits.update([torch.tensor([[2, 4, 99]]), torch.tensor([[0, 2, 99]])], torch.tensor([[1, 1, 0]]))
    assert bits.describe() == "average bits 2.00 in the prompt"
    for layers in ([16, 8], [4, 0]):
        bits.update([torch.tensor([[each]]) for each in layers], torch.ones(1, 1))
    assert bits.describe() == "average bits 2.00 in the prompt, 7.00 in new tokens"
