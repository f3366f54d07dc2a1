import numpy as np
import pytest
import torch

from modcompile.any_precision import LookupWeight, unpack_planes
from tests.tiny_any_precision import pack_planes


# A word; runs that are not full; whole runs; two runs and what is left.
@pytest.mark.parametrize("in_features", [32, 96, 992, 1024, 2048, 2080, 2144])
@pytest.mark.parametrize("num_bits", [3, 8])
def test_unpacks_what_was_packed_byte_by_byte(in_features: int, num_bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**num_bits, (5, in_features), np.uint8)
    assert torch.equal(unpack_planes(pack_planes(codes, num_bits)), torch.from_numpy(codes))


def test_bits_of_a_run_are_where_the_layout_says() -> None:
    # Feature 1024 + 8 * 3 * 2 + 8 * 1 + 5 of two runs, the second of 3 words: stretch 2, word 1, bit 5 of the byte.
    planes = torch.zeros(1, 1, 32 + 3, dtype=torch.int32)
    planes[0, 0, 32 + 1] = 1 << (31 - 8 * 2 - 5)
    assert unpack_planes(planes).nonzero().tolist() == [[0, 1024 + 8 * 3 * 2 + 8 * 1 + 5]]


@pytest.mark.parametrize("precision", range(3, 9))
def test_each_precision_looks_its_first_bits_up_in_its_own_table(precision: int) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (4, 2144), np.uint8)
    tables = {
        bits: torch.randn(4, 2**bits, generator=torch.Generator().manual_seed(bits)).half() for bits in range(3, 9)
    }
    dense = LookupWeight(pack_planes(codes, 8), tables).dequantize(precision)
    assert dense.dtype == torch.float32
    expected = [
        [float(tables[precision][row, code >> (8 - precision)]) for code in line]
        for row, line in enumerate(codes.tolist())
    ]
    assert dense.tolist() == expected
