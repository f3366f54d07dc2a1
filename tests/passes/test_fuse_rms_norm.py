import pytest
import torch
from torch import fx
from torch.nn import functional
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modcompile.passes.drop_casts import drop_casts
from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.fuse_rms_norm import fuse_rms_norm
from tests.passes.traced import BATCH, TOKENS, Function, Run, calls, random, traced

_SIZE, _EPS = 8, 1e-3  # so large an eps that leaving it out would show
_X, _WEIGHT = random(BATCH, TOKENS, _SIZE), random(_SIZE, seed=1)


def _fused(gm: fx.GraphModule) -> int:
    drop_casts(gm.graph)
    count = fuse_rms_norm(gm.graph)
    eliminate_dead_code(gm.graph)
    gm.recompile()
    return count


def _root(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPS)


def _llama() -> torch.nn.Module:
    norm = LlamaRMSNorm(_SIZE, eps=_EPS)
    norm.weight.data.copy_(_WEIGHT)
    return norm


def _gemma() -> torch.nn.Module:
    norm = GemmaRMSNorm(_SIZE, eps=_EPS)
    norm.weight.data.copy_(_WEIGHT - 1)
    return norm


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Run(lambda self, x: self.inner(x), inner=_llama()), id="LLaMA"),
        pytest.param(Run(lambda self, x: self.inner(x), inner=_gemma()), id="Gemma"),
        pytest.param(Run(lambda self, x: (_root(x) * x) * self.weight, weight=_WEIGHT), id="the other way round"),
    ],
)
def test_fuses_norms(module: torch.nn.Module) -> None:
    gm = traced(module, _X)
    assert _fused(gm) == 1
    assert calls(gm)["rms_norm"] == 1
    assert not {"pow", "mean", "rsqrt"} & calls(gm).keys()
    torch.testing.assert_close(gm(_X)[0], functional.rms_norm(_X, [_SIZE], _WEIGHT, _EPS))


def test_fuses_norms_of_heads() -> None:
    heads = random(BATCH, TOKENS, 2, _SIZE)
    gm = traced(Run(lambda self, x: self.inner(x), inner=_llama()), heads)
    assert _fused(gm) == 1
    torch.testing.assert_close(gm(heads)[0], functional.rms_norm(heads, [_SIZE], _WEIGHT, _EPS))


def test_keeps_what_others_use() -> None:
    def function(self: Run, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        root = _root(x)
        return self.weight * (x * root), root

    gm = traced(Run(function, weight=_WEIGHT), _X)
    expected = gm(_X)
    assert _fused(gm) == 1
    torch.testing.assert_close(gm(_X), expected)


def test_fuses_each_of_several() -> None:
    gm = traced(Run(lambda self, x: self.inner(self.inner(x)), inner=_llama()), _X)
    expected = gm(_X)
    assert _fused(gm) == 2
    assert _fused(gm) == 0
    torch.testing.assert_close(gm(_X), expected)


def _other_power(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + _EPS))


def _other_dimension(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + _EPS))


def _of_another_tensor(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * _root(x + 1))


def _without_eps(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


def _eps_of_every_token(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1].abs()))


def _scaled_eps(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight * (x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.5, alpha=2)))


def _without_weight(_: Run, x: torch.Tensor) -> torch.Tensor:
    return x * _root(x)


def _weight_of_one(self: Run, x: torch.Tensor) -> torch.Tensor:
    return self.weight[:1] * (x * _root(x))


@pytest.mark.parametrize(
    "function",
    [
        _other_power,
        _other_dimension,
        _of_another_tensor,
        _without_eps,
        _eps_of_every_token,
        _scaled_eps,
        _without_weight,
        _weight_of_one,
    ],
)
def test_skips_what_is_none(function: Function) -> None:
    gm = traced(Run(function, weight=_WEIGHT), _X)
    assert _fused(gm) == 0
    assert "rsqrt" in calls(gm)
