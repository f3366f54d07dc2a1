from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM

from modcompile.config import RouterConfig
from modcompile.gate_curvature import GateCurvature
from modcompile.modeling import RoutedCausalLMOutput, RoutedForCausalLM
from modcompile.routed_graph import build_routed
from modcompile.skip_adapters import LowRankAdapter
from tests.tiny_routed import tiny_base

IDS = torch.arange(3, 15).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PREDICTING = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]) == 1
ONE_EACH = torch.ones(2)


def _model(blocks_per_gate: int = 1) -> RoutedForCausalLM:
    """Gates of which some are open and some closed, adapters, blocks that change little, and no word that is likely."""
    base = tiny_base()
    assert isinstance(base, LlamaForCausalLM)
    with torch.no_grad():
        base.lm_head.weight *= 0.2
        base.model.embed_tokens.weight /= base.model.embed_tokens.weight.std()
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    torch.manual_seed(0)
    config = RouterConfig(
        router_hidden_size=0, skip_adapter="low_rank", adapter_rank=4, blocks_per_gate=blocks_per_gate
    )
    model = build_routed(base, config, use_cache=False).train()
    for router in model.routers.values():
        nn.init.normal_(router.get_parameter("score.down.weight"), std=0.3)
        nn.init.zeros_(router.get_parameter("bias"))
    for adapter in model.adapters.values():
        assert isinstance(adapter, LowRankAdapter)
        nn.init.normal_(adapter.up.weight, std=0.05)
    return model


def _gates(output: RoutedCausalLMOutput) -> list[torch.Tensor]:
    assert output.gates is not None
    return list(dict.fromkeys(output.gates))


def _mean_correction(
    curvature: GateCurvature, output: RoutedCausalLMOutput, draws: int, shares: torch.Tensor = ONE_EACH
) -> list[torch.Tensor]:
    """The mean over draws of what is added to the gradient of every gate."""
    gates, sums = _gates(output), [torch.zeros(2, 6, 1) for _ in _gates(output)]
    for _ in range(draws):
        correction = curvature.correction(output, PREDICTING, shares)
        assert correction == 0
        for total, gradient in zip(sums, torch.autograd.grad(correction, gates, retain_graph=True), strict=True):
            total += gradient / draws
    return sums


def _expected_curvature(output: RoutedCausalLMOutput, gate: torch.Tensor) -> torch.Tensor:
    """By the definition: over all labels of all tokens that predict, the mean of the squared slope, `[B, T, 1]`."""
    assert output.logits is not None
    found = torch.zeros_like(gate)
    vocabulary = output.logits.shape[-1]
    for row, column in PREDICTING.nonzero().tolist():
        of_token = log_softmax(output.logits[row, column], -1)
        every = torch.eye(vocabulary)
        (slopes,) = torch.autograd.grad(of_token, gate, every, retain_graph=True, is_grads_batched=True)
        found += (of_token.detach().exp().view(-1, 1, 1, 1) * slopes.square()).sum(0)
    return found


@pytest.mark.parametrize("blocks_per_gate", [1, 2])
def test_adds_half_of_the_curvature_towards_open_where_closed_and_away_where_open(blocks_per_gate: int) -> None:
    model = _model(blocks_per_gate)
    curvature, output = GateCurvature(model), model(IDS, MASK)
    gates = _gates(output)
    decided = torch.cat([gate[MASK == 1] for gate in gates])
    assert 0 < decided.mean() < 1
    torch.manual_seed(0)
    found = _mean_correction(curvature, output, 1000)
    for gate, correction in zip(gates, found, strict=True):
        expected = (0.5 - gate.detach()) * _expected_curvature(output, gate)
        assert expected.abs().max() > 0
        # The mean of 1,000 draws of what is about the square of a normal variable: sqrt(2 / 1000) is 0.045.
        torch.testing.assert_close(correction, expected, rtol=0.2, atol=0.02 * float(expected.abs().max()))


def test_corrected_slopes_say_what_a_flipped_gate_changes() -> None:
    model = _model()
    with torch.no_grad():
        dense = log_softmax(model.base(IDS, attention_mask=MASK).logits, -1)

    def divergence(output: RoutedCausalLMOutput) -> torch.Tensor:
        assert output.logits is not None
        of_tokens = (dense.exp() * (dense - log_softmax(output.logits, -1))).sum(-1)
        return of_tokens[PREDICTING].sum()

    curvature, output = GateCurvature(model), model(IDS, MASK)
    gates = _gates(output)
    first = torch.autograd.grad(divergence(output), gates, retain_graph=True)
    torch.manual_seed(0)
    second = _mean_correction(curvature, output, 1000)
    changes, slopes, corrected = [], [], []
    for gate, router, slope, correction in zip(gates, model.routers.values(), first, second, strict=True):
        for row, column in (MASK == 1).nonzero().tolist():
            sign = 1 - 2 * float(gate.detach()[row, column])
            with torch.no_grad():
                flipped = _with(router, _flip(row, column), lambda: model(IDS, MASK))
            # Only gates whose flip leaves all others as they are: what they decide on has changed.
            if sum(int((a != b).sum()) for a, b in zip(_gates(flipped), gates, strict=True)) != 1:
                continue
            changes.append(sign * float(divergence(flipped).detach() - divergence(output).detach()))
            slopes.append(float(slope[row, column]))
            corrected.append(float(slope[row, column] + correction[row, column]))
    assert len(changes) > 10
    error = (torch.tensor(corrected) - torch.tensor(changes)).norm()
    assert error < 0.25 * torch.tensor(changes).norm()
    assert error < 0.5 * (torch.tensor(slopes) - torch.tensor(changes)).norm()


def _flip(row: int, column: int) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
    def hook(_: nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        flipped = logits.clone()
        flipped[row, column] *= -1
        return flipped

    return hook


def _with(
    router: nn.Module,
    hook: Callable[[nn.Module, object, torch.Tensor], torch.Tensor],
    call: Callable[[], RoutedCausalLMOutput],
) -> RoutedCausalLMOutput:
    handle = router.register_forward_hook(hook)
    try:
        return call()
    finally:
        handle.remove()


def test_sequences_count_as_their_shares_say() -> None:
    model = _model()
    curvature, output = GateCurvature(model), model(IDS, MASK)
    torch.manual_seed(0)
    alike = _mean_correction(curvature, output, 1)
    torch.manual_seed(0)
    weighted = _mean_correction(curvature, output, 1, torch.tensor([2.0, 0.5]))
    for one, other in zip(alike, weighted, strict=True):
        torch.testing.assert_close(other, one * torch.tensor([2.0, 0.5]).view(2, 1, 1))


def test_no_token_adds_more_than_half_a_nat() -> None:
    model = _model()
    with torch.no_grad():
        model.base.get_output_embeddings().weight *= 100  # words that are nearly certain
    curvature, output = GateCurvature(model), model(IDS, MASK)
    torch.manual_seed(0)
    added = torch.cat(_mean_correction(curvature, output, 1))
    assert float(added.min()) == -0.5
    assert float(added.max()) == 0.5


def test_padding_has_no_curvature() -> None:
    model = _model()
    output = model(IDS, MASK)
    for correction in _mean_correction(GateCurvature(model), output, 3):
        assert not correction[MASK == 0].any()


def _taught_in_front(model: RoutedForCausalLM) -> bool:
    """Whether the router of the last layer has a gradient at the adapter of the first."""
    said: list[torch.Tensor] = []
    *_, last = model.routers.values()
    handle = last.register_forward_hook(lambda _, __, logits: said.append(logits))
    model(IDS, MASK)
    handle.remove()
    adapter = model.adapters[0]
    assert isinstance(adapter, LowRankAdapter)
    (gradient,) = torch.autograd.grad(said[0].sum(), adapter.up.weight, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def test_routers_do_not_teach_what_lies_in_front_until_it_stops() -> None:
    model = _model()
    assert _taught_in_front(model)
    curvature = GateCurvature(model)
    assert not _taught_in_front(model)
    model.eval()
    assert _taught_in_front(model)
    model.train()
    curvature.stop()
    assert _taught_in_front(model)
