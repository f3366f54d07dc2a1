import pytest
import torch

from modcompile.errors import UnsupportedModelError
from modcompile.export.round_to_half import round_to_half
from modcompile.routed_graph import trace_outlined
from tests.tiny_models import tiny_model


def test_rounds_matrices_and_leaves_vectors(architecture: str) -> None:
    model, original = tiny_model(architecture), tiny_model(architecture)
    round_to_half(trace_outlined(model))
    changed = set()
    for name, before in original.named_parameters():
        after = model.get_parameter(name)
        if not torch.equal(after, before):
            assert torch.equal(after, before.half().float())
            changed.add(name)
    assert len(changed) > 3 * 4
    assert all(model.get_parameter(name).dim() == 2 for name in changed)


def test_refuses_a_weight_that_becomes_infinite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = -70000
    with pytest.raises(UnsupportedModelError, match=r"^a weight is 70000, and float16 ends at 65504; export with"):
        round_to_half(trace_outlined(model))
