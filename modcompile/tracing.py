"""From a transformers causal LM to a flat ATen graph with its cache as inputs and outputs.

The trace takes `input_ids [B, T]`, `attention_mask [B, P + T]`, `position_ids [B, T]` and for each layer a past key and
value `[B, heads, P, D]`; it returns the logits `[B, T, V]` and for each layer the present key and value
`[B, heads, P + T, D]`. B, T and P are free, and P may be 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from modcompile.errors import UnsupportedModelError
from modcompile.stages import stage
from modcompile.traceable_masks import traceable_masks

_BATCH, _SEQUENCE, _PAST = 2, 3, 5  # all different, none of them 0 or 1: export merges and specialises equal sizes

_INDEX_NAMES = ("layer_idx", "layer_index", "layer_id")

CacheTensors = list[tuple[torch.Tensor, torch.Tensor]]


@stage("tracing")
def trace_causal_lm(model: PreTrainedModel, *, use_cache: bool = True) -> fx.GraphModule:
    """Trace `model` at whatever depth it has; without a cache, inputs and outputs are only those of the tokens.

    The graph shares its parameters with `model`, under their names behind `model.`.

    Raises:
        UnsupportedModelError: the model keeps no keys and values, or `torch.export` can't trace it.
    """
    device = model.device
    input_ids = torch.arange(_BATCH * _SEQUENCE, device=device).view(_BATCH, _SEQUENCE) % model.config.vocab_size
    past_length = _PAST if use_cache else 0
    # An all-ones mask would let the mask vanish from the trace.
    attention_mask = torch.ones(_BATCH, past_length + _SEQUENCE, dtype=torch.long, device=device)
    attention_mask[0, 0] = 0
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -_SEQUENCE:]
    args: tuple[Any, ...] = (input_ids, attention_mask, position_ids)
    free = torch.export.Dim.AUTO
    shapes: tuple[Any, ...] = ({0: free, 1: free},) * 3
    if use_cache:
        # Every tensor is an object of its own: export merges the inputs that are one object.
        args += (_example_cache(model),)
        shapes += ([({0: free, 2: free}, {0: free, 2: free}) for _ in args[-1]],)
    with eval_mode(model), traceable_masks(model), torch.no_grad():
        try:
            ep = torch.export.export(_FlatCausalLM(model), args, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UnsupportedModelError(
                f"torch.export can't trace {type(model).__name__}: {first_line} (the model must run with a key/value "
                "cache, an attention mask and no data-dependent control flow)"
            ) from error
    module = ep.module()
    assert isinstance(module, fx.GraphModule)
    return module


def cache_shapes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """(key/value heads, key size, value size) of every layer, found by running the model on one token.

    Raises:
        UnsupportedModelError: the model fills no plain key/value cache.
    """
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with eval_mode(model), torch.no_grad():
        try:
            model(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache, use_cache=True)
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModelError(f"{type(model).__name__} does not run with a cache: {error}") from error
    tensors = from_cache(cache)
    if not tensors or any(keys.dim() != 4 for keys, _ in tensors):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps no keys and values; modcompile needs a causal decoder"
        )
    return [(keys.shape[1], keys.shape[3], values.shape[3]) for keys, values in tensors]


def to_cache(tensors: CacheTensors) -> DynamicCache:
    """A transformers cache that holds the given keys and values, without copying them."""
    cache = DynamicCache()
    for keys, values in tensors:
        # update() on an empty layer would leave a constant in the trace that the ONNX exporter refuses.
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        layer.dtype, layer.device = keys.dtype, keys.device
        cache.layers.append(layer)
    return cache


def from_cache(cache: Cache) -> CacheTensors:
    """The keys and values of every layer that a transformers cache has filled."""
    layers = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    pairs = [(layer.keys, layer.values) for layer in layers]
    return [(keys, values) for keys, values in pairs if keys is not None and values is not None]


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The module list that holds the decoder layers: the one with the most parameters.

    Raises:
        UnsupportedModelError: the model has no list of two modules or more.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of two or more decoder layers to route")
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def layers_are_alike(layers: nn.ModuleList) -> bool:
    """Whether the layers differ in their parameters and their index only: same classes, shapes and settings.

    A hybrid (sliding and full attention by turns, dense and expert MLPs) is not alike, and must be traced whole.
    """
    return len({_settings(layer) for layer in layers}) == 1


@contextmanager
def truncated(layers: nn.ModuleList, depth: int) -> Iterator[None]:
    """`layers` with only its first `depth` members, and back to all of them."""
    members = dict(layers._modules)
    try:
        for name in list(members)[depth:]:
            del layers._modules[name]
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(members)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and the like off, and back to what it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _example_cache(model: PreTrainedModel) -> CacheTensors:
    def example(heads: int, size: int) -> torch.Tensor:
        return torch.zeros(_BATCH, heads, _PAST, size, dtype=model.dtype, device=model.device)

    return [(example(heads, key), example(heads, value)) for heads, key, value in cache_shapes(model)]


def _settings(layer: nn.Module) -> str:
    plain = (bool, int, float, str, tuple, list, type(None))
    lines = []
    for name, module in layer.named_modules():
        attributes = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, plain) and not key.startswith("_") and not key.endswith(_INDEX_NAMES)
        }
        tensors = {key: tuple(tensor.shape) for key, tensor in module.named_parameters(recurse=False)}
        lines.append(f"{name} {type(module).__qualname__} {sorted(attributes.items())} {sorted(tensors.items())}")
    return "\n".join(lines)


class _FlatCausalLM(nn.Module):
    """The model with its cache as a plain list of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: CacheTensors | None = None,
    ) -> tuple[torch.Tensor, CacheTensors]:
        _check_sizes(input_ids, attention_mask, past_key_values or [])
        cache = None if past_key_values is None else to_cache(past_key_values)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.logits, [] if cache is None else from_cache(cache)


def _check_sizes(input_ids: torch.Tensor, attention_mask: torch.Tensor, past: CacheTensors) -> None:
    """Tell the tracer which sizes are one size, so that the graph has one symbol for each of B, T and P."""
    batch, sequence = input_ids.shape
    past_length = past[0][0].shape[2] if past else 0
    torch._check(attention_mask.shape[0] == batch)
    torch._check(attention_mask.shape[1] == past_length + sequence)
    for tensor in (tensor for pair in past for tensor in pair):
        torch._check(tensor.shape[0] == batch)
        torch._check(tensor.shape[2] == past_length)
