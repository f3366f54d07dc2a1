import pytest
import torch
from torch import fx

from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from tests.passes.traced import BATCH, TOKENS, Run, random, traced

_WEIGHTS = {
    "llama": {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "opt": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}
_WEIGHTS["mistral"] = _WEIGHTS["qwen2"] = _WEIGHTS["llama"]


def test_finds_the_linear_layers_of_a_block(outlined: fx.GraphModule, architecture: str) -> None:
    for call in block_calls(outlined.graph):
        block = outlined.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        uses = find_linears(block.graph)
        names = [str(use.weight.target) for use in uses]
        assert sorted(names) == sorted(f"{name}.weight" for name in _WEIGHTS[architecture])
        assert {use.is_transposed for use in uses} == {architecture == "gpt2"}


def test_products_of_activations_are_none() -> None:
    gm = traced(Run(lambda self, x: torch.matmul(x, x.transpose(1, 2)) @ x), random(BATCH, TOKENS, 8))
    assert find_linears(gm.graph) == []


@pytest.mark.parametrize("bias", [True, False])
def test_finds_matrices_that_are_multiplied_by_hand(bias: bool) -> None:
    def function(self: Run, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 8)
        return torch.addmm(self.weight[0], flat, self.weight) if bias else flat @ self.weight

    gm = traced(Run(function, weight=random(8, 8)), random(BATCH, TOKENS, 8))
    (use,) = find_linears(gm.graph)
    assert use.is_transposed
