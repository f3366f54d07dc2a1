import pytest
import torch

from modcompile.passes.quantized_ops import matmul_nbits
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


def test_the_operator_is_what_its_fake_says() -> None:
    quantized = quantize(_WEIGHT, 4, 32)
    packed = pack(quantized.codes, 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(matmul_nbits, (_X, packed, quantized.scales, None, 4), test_utils=checks)
