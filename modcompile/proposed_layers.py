"""Propose the layers that are worth a gate: those that some tokens could do without.

On some text, each token's cost of skipping each layer is estimated (`skip_costs`, the layer left out, nothing in its
place). If the cheaper half of all pairs of a token and a layer were skipped, some layers would still be executed for
nearly all tokens, in most models the first and the last: a gate there costs time and learns nothing. Where attention or
MLP have gates, it is they who are left out, and a layer is worth it if one of them is.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modcompile.config import RouterConfig
from modcompile.corpus import builtin_documents
from modcompile.errors import ConfigError, DataError
from modcompile.granularity import Granularity, halves_of
from modcompile.layer_ranges import name_of, runs_of
from modcompile.packing import tokenize_and_pack
from modcompile.progress import show_elapsed
from modcompile.skip_costs import trace_dense
from modcompile.tracing import find_layers

SKIPPED, LEAST_SHARE = 0.5, 0.05
_SEQUENCES, _LENGTH = 8, 256


def with_proposed_layers(
    config: RouterConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> RouterConfig:
    """The configuration with a list in the place of `--router_layers auto`.

    Raises:
        DataError: there is no tokenizer to read a text with.
        ConfigError: the rest of the configuration leaves no layer to choose from.
    """
    if tokenizer is None:
        raise DataError("--router_layers auto reads a text, and the model has no tokenizer; add its files, or a list")
    candidates = replace(config, router_layers=None).routed_layers(len(find_layers(base)))
    with show_elapsed("choosing layers"):
        layers = propose_layers(base, tokenizer, candidates, config.granularity)
    proposed = replace(config, router_layers=",".join(map(name_of, runs_of(layers))))
    print(f"--router_layers auto is {proposed.router_layers}, {len(layers)} of {len(candidates)} layers")
    return proposed


def propose_layers(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[int],
    granularity: Granularity = "block",
    *,
    seed: int = 0,
) -> list[int]:
    """Of these layers those whose share of tokens among the cheapest `SKIPPED` of all is `LEAST_SHARE` or more.

    Of a layer's gated halves, the share of the one that has more counts.

    Raises:
        ConfigError: there is none, as of a model with a single candidate; or too little memory to tell.
    """
    positions = getattr(base.config, "max_position_embeddings", None)
    length = _LENGTH if positions is None else min(_LENGTH, positions)
    texts = builtin_documents("validation")
    blocks = tokenize_and_pack(texts, tokenizer, length, max_positions=positions, source="the built-in text")
    blocks = blocks.select(range(min(_SEQUENCES, blocks.num_rows)))
    named = {"option": "--router_layers auto", "instead": "a list"}
    trace = trace_dense(base, granularity, blocks, batch_size=2, seed=seed, **named)
    gated = [halves_of(layer, granularity) for layer in candidates]
    costs = torch.stack([torch.stack([trace.costs(half, trace.states[half]) for half in halves]) for halves in gated])
    limit = costs.flatten().sort().values[int(SKIPPED * costs.numel())]
    shares = (costs < limit).float().mean(2).max(1).values.tolist()
    layers = [layer for layer, share in zip(candidates, shares, strict=True) if share >= LEAST_SHARE]
    if not layers:
        raise ConfigError("--router_layers auto finds no layer that tokens could do without; give a list")
    return layers
