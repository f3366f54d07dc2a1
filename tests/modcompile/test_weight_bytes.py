from dataclasses import replace
from pathlib import Path

import pytest

from modcompile.config import RouterConfig
from modcompile.errors import UnsupportedModelError
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.quantized_folder import read_quantized_folder
from modcompile.tracing import find_layers
from modcompile.weight_bytes import weight_bytes
from tests.tiny_any_precision import tiny_any_precision, write_any_precision
from tests.tiny_models import HIDDEN_SIZE

RANK = 4
DEPTH = RouterConfig(router_hidden_size=0, lock_last_layers=1, skip_adapter="low_rank", adapter_rank=RANK)
ADAPTER = 2 * 2 * RANK * HIDDEN_SIZE


def _expected(folder: Path, layer: int, bits: int, kept: str = "") -> int:
    """Of the tensors that a folder holds of a block, those with `kept` in their names; floats count two bytes."""
    read = read_quantized_folder(folder)
    (prefix,) = [name for name, module in read.base.named_modules() if module is find_layers(read.base)[layer]]
    total = 0
    for name, parameter in read.base.named_parameters():
        if not name.startswith(f"{prefix}.") or kept not in name:
            continue
        if bits == 16 or name not in read.weights:
            total += 2 * parameter.numel()
        else:
            for part in read.weights[name].used_parts(bits).values():
                assert part.zero_points.unique().tolist() == [2 ** (part.num_bits - 1)]  # which is then left out
                total += part.packed.numel() + 2 * part.scales.numel()
    return total


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_counts_what_a_choice_makes_a_token_read(quantized_folder: Path, scope: str) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, depth=DEPTH, router_scope=scope)
    found = weight_bytes(model)
    assert [list(by_bits) for by_bits in found.blocks] == [[0, 2, 4, 16], [0, 2, 4, 16], [2, 4, 16]]
    for layer, by_bits in enumerate(found.blocks):
        # A block that runs for some tokens has the others go through its adapter.
        beside = ADAPTER if layer in model.adapters and scope == "sequence" else 0
        for bits in model.precisions:
            assert by_bits[bits] == _expected(quantized_folder, layer, bits) + beside
    first = found.blocks[0]
    of_keys = sum(_expected(quantized_folder, 0, 2, kept=each) for each in (".k_proj", ".v_proj", ".input_layernorm"))
    assert first[0] == of_keys + ADAPTER
    head = 2 * (HIDDEN_SIZE * model.config.vocab_size + HIDDEN_SIZE)
    routers = [*model.routers.values(), *model.depth_routers.values()]
    count = sum(parameter.numel() for router in routers for parameter in router.parameters())
    assert count < found.rest - head < 2 * count  # most of them have 8 bits


def test_of_tokens_with_different_bits_it_is_the_mean(quantized_folder: Path) -> None:
    found = weight_bytes(LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4, 16], depth=DEPTH))
    first, second, last = found.blocks
    shares: list[dict[int, float]] = [{0: 0.25, 16: 0.75}, {4: 1.0}, {4: 0.5, 16: 0.5}]
    expected = found.rest + 0.25 * first[0] + 0.75 * first[16] + second[4] + 0.5 * (last[4] + last[16])
    assert found.per_token(shares) == pytest.approx(expected)


def test_without_gates_nothing_is_skipped(quantized_folder: Path) -> None:
    found = weight_bytes(LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4]))
    assert [list(by_bits) for by_bits in found.blocks] == [[4]] * 3
    gated = replace(DEPTH, skip_adapter="none")
    with_gates = weight_bytes(LayerwiseQuantizeForCausalLM.from_quantized(quantized_folder, [4], depth=gated))
    assert [by_bits[4] for by_bits in with_gates.blocks] == [by_bits[4] for by_bits in found.blocks]


def test_look_up_tables_are_refused(tmp_path: Path) -> None:
    write_any_precision(tiny_any_precision(), tmp_path / "tables")
    with pytest.raises(UnsupportedModelError, match="is looked up in tables"):
        weight_bytes(LayerwiseQuantizeForCausalLM.from_quantized(tmp_path / "tables"))
