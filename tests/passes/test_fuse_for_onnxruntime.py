import torch

from modcompile.passes import fuse_operators
from modcompile.passes.fuse_for_onnxruntime import fuse_for_onnxruntime
from tests.model_inputs import make_inputs
from tests.tiny_graphs import outlined_graph, shared_model
from tests.wide_models import MAX_POSITIONS, wide_model, wide_outlined


@torch.no_grad()
def test_fuses_what_runs_in_place() -> None:
    dense = wide_outlined("llama")
    fused = fuse_for_onnxruntime(fuse_operators(dense), MAX_POSITIONS)
    assert fused.updates_in_place
    assert fused.unfused == ()
    inputs = make_inputs(wide_model("llama"), 3, 5, 0, "left")
    logits, expected = (gm(*inputs.flat)[0][inputs.is_token] for gm in (fused.gm, dense))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_leaves_alone_what_it_cannot_fuse_and_says_why() -> None:
    gm = fuse_operators(outlined_graph("llama"))
    fused = fuse_for_onnxruntime(gm, MAX_POSITIONS)
    assert not fused.updates_in_place
    assert fused.unfused == ("attention: heads of 8 features, where the operator takes multiples of 16",)
    inputs = make_inputs(shared_model("llama"), 3, 5, 4, "left")
    torch.testing.assert_close(fused.gm(*inputs.flat), gm(*inputs.flat), rtol=0, atol=0)
