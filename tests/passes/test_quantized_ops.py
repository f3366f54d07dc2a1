import pytest
import torch

from modcompile.passes.quantized_ops import gather_block_quantized, matmul_nbits, operands
from modcompile.precisions import PackedWeight
from modcompile.quantization import pack, quantize

_X = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))
_WEIGHT = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_multiplies_by_the_weight_that_the_codes_stand_for(bits: int, symmetric: bool) -> None:
    quantized = quantize(_WEIGHT, bits, 32, symmetric=symmetric)
    packed = pack(quantized.codes, bits)
    padded = torch.nn.functional.pad(quantized.zero_points, (0, -3 % (8 // bits)))
    product = matmul_nbits(_X, packed, quantized.scales, pack(padded, bits), bits)
    torch.testing.assert_close(product, _X @ quantized.dequantize(70).T)
    if symmetric:
        torch.testing.assert_close(matmul_nbits(_X, packed, quantized.scales, None, bits), product)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 0)])
def test_looks_up_in_the_weight_that_the_codes_stand_for(bits: int, symmetric: bool, shape: tuple[int, ...]) -> None:
    quantized = quantize(_WEIGHT, bits, 32, symmetric=symmetric)
    ids = torch.randint(5, shape, generator=torch.Generator().manual_seed(2))
    read = operands(PackedWeight.of(quantized))
    found = gather_block_quantized(ids, read["packed"], read["scales"], read.get("zero_points"), bits, 70)
    assert torch.equal(found, quantized.dequantize(70)[ids])
    assert found.shape == (*shape, 70)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_reads_zero_points_only_where_they_are_not_the_middle_code(bits: int) -> None:
    """With them or without, it is one product."""
    for symmetric, names in ((True, ["packed", "scales"]), (False, ["packed", "scales", "zero_points"])):
        quantized = quantize(_WEIGHT, bits, 32, symmetric=symmetric)
        read = operands(PackedWeight.of(quantized))
        assert list(read) == names
        product = matmul_nbits(_X, read["packed"], read["scales"], read.get("zero_points"), bits)
        torch.testing.assert_close(product, _X @ quantized.dequantize(70).T)


def test_the_operators_are_what_their_fakes_say() -> None:
    quantized = quantize(_WEIGHT, 4, 32)
    packed = pack(quantized.codes, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(matmul_nbits, (_X, packed, quantized.scales, None, 4), test_utils=checks)
    ids = torch.tensor([[3, 0, 4]])
    torch.library.opcheck(gather_block_quantized, (ids, packed, quantized.scales, None, 4, 70), test_utils=checks)
