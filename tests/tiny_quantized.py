"""A quantized LLaMA that goes with the tokenizer of `tiny_tokenizer`, and routers for it that decide by the tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modcompile.artifacts import save_depth_routers
from modcompile.config import RouterConfig
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_config import QuantizationConfig
from modcompile.precision_router_files import save_precision_routers
from modcompile.precisions import FULL_PRECISION
from modcompile.quantized_folder import read_quantized_folder, write_quantized_folder
from modcompile.quantizing import quantize_base
from modcompile.routers import DepthRouter
from tests.tiny_routed import tiny_base

NUM_LAYERS = 3
BITS = [2, 4, 16]


def write_tiny_quantized(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Path:
    """`tiny_base` at 2, 4 and 16 bits."""
    write_quantized_folder(
        quantize_base(tiny_base(), QuantizationConfig(precisions=BITS, group_size=32, method="rtn")), tokenizer, folder
    )
    return folder


def let_routers_decide(model: LayerwiseQuantizeForCausalLM) -> None:
    """Random routers whose choices differ from sequence to sequence, and gates that skip some of the tokens.

    And adapters that change what they skip.
    """
    torch.manual_seed(1)
    for router in model.routers.values():
        for linear in router.children():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight)
                nn.init.zeros_(linear.bias)
    for gate_router in model.depth_routers.values():
        assert isinstance(gate_router, DepthRouter)
        nn.init.normal_(gate_router.score.down.weight, std=2.0)
        nn.init.zeros_(gate_router.bias)
    for adapter in model.adapters.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)


def save_deciding_routers(
    folder: Path, depth: RouterConfig | None = None, *, precisions: Sequence[int] | None = None
) -> None:
    """Write routers that decide into a quantized folder, as a training would; with `depth`, gates too."""
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions, depth=depth)
    let_routers_decide(model)
    save_precision_routers(model.routers, model.router_config, model.precisions, folder)
    if depth is not None:
        save_depth_routers(model.depth_routers, depth, folder, model.adapters)


def plain_model(folder: Path, bits: Sequence[int]) -> PreTrainedModel:
    """The model of transformers on weights that are dequantized here, each block at bits of its own."""
    read = read_quantized_folder(folder)
    layers = next(child for child in read.base.modules() if isinstance(child, nn.ModuleList))
    precisions = {
        id(parameter): each for layer, each in zip(layers, bits, strict=True) for parameter in layer.parameters()
    }
    with torch.no_grad():
        for name, weight in read.weights.items():
            parameter = read.base.get_parameter(name)
            if precisions[id(parameter)] != FULL_PRECISION:
                parameter.copy_(weight.dequantize(precisions[id(parameter)]))
    return read.base
