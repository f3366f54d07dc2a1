import pytest
import torch

from modcompile.torch_threads import torch_threads


def test_sets_the_number_and_puts_it_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 2):
        assert torch.get_num_threads() == before + 2
        with torch_threads(None):
            assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before


def test_puts_it_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="of mine"), torch_threads(before + 1):
        raise ValueError("of mine")
    assert torch.get_num_threads() == before
