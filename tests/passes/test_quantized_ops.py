import pytest
import torch

from modcompile.passes.quantized_ops import dequantize, matmul_nbits
from modcompile.quantization import pack, quantize

_X = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(1))
_WEIGHT = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_multiplies_by_the_weight_that_the_codes_stand_for(bits: int, symmetric: bool) -> None:
    quantized = quantize(_WEIGHT, bits, 32, symmetric=symmetric)
    packed = pack(quantized.codes, bits)
    padded = torch.nn.functional.pad(quantized.zero_points, (0, -3 % (8 // bits)))
    dense = dequantize(packed, quantized.scales, quantized.zero_points, bits, 70)
    torch.testing.assert_close(dense, quantized.dequantize(70), rtol=0, atol=0)
    product = matmul_nbits(_X, packed, quantized.scales, pack(padded, bits), bits)
    torch.testing.assert_close(product, _X @ dense.T)
    if symmetric:
        torch.testing.assert_close(matmul_nbits(_X, packed, quantized.scales, None, bits), product)


def test_operators_are_what_their_fakes_say() -> None:
    quantized = quantize(_WEIGHT, 4, 32)
    packed = pack(quantized.codes, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(dequantize, (packed, quantized.scales, quantized.zero_points, 4, 70), test_utils=checks)
    torch.library.opcheck(matmul_nbits, (_X, packed, quantized.scales, None, 4), test_utils=checks)
