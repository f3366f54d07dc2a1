import pytest
import torch
from datasets import Dataset
from torch import fx
from transformers import PreTrainedModel

from modcompile.block_inputs import BlockInputs
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.find_linears import find_linears
from modcompile.passes.outlined_form import block_calls
from modcompile.routed_graph import trace_outlined
from tests.tiny_graphs import shared_model
from tests.wide_models import wide_model


def _sequences(text: Dataset) -> list[torch.Tensor]:
    return [torch.tensor([row["input_ids"][: sum(row["attention_mask"])]]) for row in text]


def _seen_by_hooks(model: PreTrainedModel, text: Dataset, layer: int) -> dict[str, torch.Tensor]:
    """The weighted Hessians of one layer of the model of transformers, by the names of its modules with weights."""
    layers = next(child for child in model.modules() if isinstance(child, torch.nn.ModuleList))
    modules = {
        name: module
        for name, module in model.named_modules()
        if f".{layer}." in name and getattr(module, "weight", torch.empty(0)).dim() == 2
    }
    hessians: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for ids in _sequences(text):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        outputs: list[torch.Tensor] = []

        def keep(
            name: str,
            module: torch.nn.Module,
            args: tuple[torch.Tensor],
            y: torch.Tensor,
            seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = seen,
        ) -> None:
            seen[name] = args[0].detach(), y

        def start(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return args[0].detach().requires_grad_(), *args[1:]

        def end(
            module: torch.nn.Module,
            args: object,
            y: torch.Tensor | tuple[torch.Tensor],
            outputs: list[torch.Tensor] = outputs,
        ) -> None:
            outputs.append(y[0] if isinstance(y, tuple) else y)

        handles = [
            module.register_forward_hook(lambda *args, name=name, keep=keep: keep(name, *args))
            for name, module in modules.items()
        ]
        handles += [layers[layer].register_forward_pre_hook(start), layers[layer].register_forward_hook(end)]
        model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        (output,) = outputs
        scale = (output.detach().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        probe = torch.randn(output.shape, generator=generator) / scale
        gradients = torch.autograd.grad(output, [y for _, y in seen.values()], probe)
        for (name, (x, _)), gradient in zip(seen.items(), gradients, strict=True):
            x, weights = x.flatten(0, -2).double(), gradient.flatten(0, -2).double().square().sum(-1)
            total = sum((weight * torch.outer(token, token) for token, weight in zip(x, weights, strict=True)))
            hessians[name] = hessians.get(name, 0) + total
    return hessians


@pytest.mark.parametrize("layer", [0, 2])
def test_collects_what_hooks_on_the_model_see(model: PreTrainedModel, random_text: Dataset, layer: int) -> None:
    gm = trace_outlined(model, use_cache=False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = BlockInputs(gm, random_text)
    calls = block_calls(gm.graph)
    blocks = [gm.get_submodule(str(call.target)) for call in calls]
    for call, block in zip(calls[:layer], blocks, strict=False):
        assert isinstance(block, fx.GraphModule)
        inputs.advance(call, block)
    block = blocks[layer]
    assert isinstance(block, fx.GraphModule)
    found = {
        names[id(get_attribute(block, str(use.weight.target)))].removesuffix(".weight"): hessian
        for use, hessian in inputs.hessians(calls[layer], block, find_linears(block.graph)).items()
    }
    expected = _seen_by_hooks(model, random_text, layer)
    assert found.keys() == expected.keys()
    for name, hessian in found.items():
        assert hessian.dtype == torch.float64
        torch.testing.assert_close(hessian, expected[name], rtol=1e-3, atol=1e-4 * float(hessian.abs().max()))


def test_a_token_weighs_what_it_counts_in_the_output_on_average(random_text: Dataset) -> None:
    model = shared_model("llama")
    gm = trace_outlined(model, use_cache=False)
    inputs = BlockInputs(gm, random_text.select([0]))
    call, *_ = block_calls(gm.graph)
    block = gm.get_submodule(str(call.target))
    assert isinstance(block, fx.GraphModule)
    *_, down = find_linears(block.graph)
    found = [inputs.hessians(call, block, [down], seed=seed)[down] for seed in range(200)]
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.0")
    handles = [
        model.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0].double())
        ),
        layer.register_forward_hook(lambda module, args, y: seen.append(y[0].double())),
    ]
    with torch.no_grad():
        model(_sequences(random_text)[0], use_cache=False)
    for handle in handles:
        handle.remove()
    x, output = seen
    # What this product adds to the output is itself: its Jacobian is the identity, over each token's scale.
    weights = output.shape[-1] / (output.square().mean(-1) + 1e-6)
    expected = (x * weights[:, None]).T @ x
    mean = torch.stack(found).mean(0)
    assert float((mean - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_a_head_suits_that_takes_what_is_known_before_the_blocks(architecture: str, random_text: Dataset) -> None:
    model = wide_model(architecture)
    gm = trace_outlined(model, use_cache=False)
    (head,) = gm.graph.find_nodes(op="call_module", target="epilogue")
    inputs = BlockInputs(gm, random_text)
    assert inputs.suit(head)
    (ids, *_) = gm.graph.find_nodes(op="placeholder")
    head.insert_arg(1, ids)
    assert not inputs.suit(head)
    head.args = (head.args[0], 1)
    assert not inputs.suit(head)
