import pytest

from modcompile.export import unmasked_branch
from modcompile.export.unmasked_branch import UnmaskedBranch, routed_bytes, wants_unmasked_branch
from modcompile.passes import lower_gates
from modcompile.passes.add_unmasked_branch import add_unmasked_branch
from tests.tiny_graphs import hard_graph, random_adapters, random_routers
from tests.wide_models import wide_lowered, wide_model, wide_outlined


def _block_bytes() -> int:
    block = wide_model("llama").get_submodule("model.layers.0")
    return sum(parameter.nbytes for parameter in block.parameters())


@pytest.mark.parametrize("gates", [(range(1),), (range(1), range(2, 3)), (range(2),)], ids=str)
def test_counts_what_routed_blocks_hold(gates: tuple[range, ...]) -> None:
    assert routed_bytes(wide_lowered("llama", gates)) == _block_bytes() * sum(map(len, gates))


def test_counts_shared_weights_once() -> None:
    lowered = wide_lowered("llama")
    assert routed_bytes(add_unmasked_branch(lowered)) == routed_bytes(lowered)


def test_a_dense_model_has_none() -> None:
    assert routed_bytes(wide_outlined("llama")) == 0


@pytest.mark.parametrize(
    ("choice", "spare", "integers", "adapters", "expected"),
    [
        ("auto", 0, True, True, True),
        ("auto", -1, True, True, False),
        ("auto", 0, False, True, False),
        ("auto", 0, True, False, False),
        ("always", -1, False, False, True),
        ("never", 0, True, True, False),
    ],
)
@pytest.mark.parametrize("groups", [(), (range(2),)], ids=["blocks", "a group"])
def test_is_wanted_for_adapters_and_integers_while_it_costs_little(
    choice: UnmaskedBranch,
    spare: int,
    integers: bool,
    adapters: bool,
    expected: bool,
    groups: tuple[range, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = (0, 2)
    hard = hard_graph("llama", random_routers(layers), groups, adapters=random_adapters(layers) if adapters else None)
    gm = lower_gates(hard)
    monkeypatch.setattr(unmasked_branch, "MAX_BYTES", routed_bytes(gm) + spare)
    assert wants_unmasked_branch(choice, gm, integers=integers) == expected
