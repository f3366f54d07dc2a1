"""The routed graph as a transformers model."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from modcompile.config import RouterConfig, check_threshold
from modcompile.errors import ConfigError
from modcompile.gradient_checkpointing import checkpoint_blocks
from modcompile.graph_inputs import cache_inputs, graph_inputs, updated_cache
from modcompile.layer_ranges import name_of
from modcompile.passes import harden_gates, lower_gates
from modcompile.passes.outlined_form import gated_layers
from modcompile.passes.retarget_device import retarget_device
from modcompile.passes.skip_path import skip_of
from modcompile.usage import RoutingUsage
from modcompile.work import work_of_layers


@dataclass
class RoutedCausalLMOutput(CausalLMOutputWithPast):
    """Adds the gates (soft) or routing masks (hard) `[B, T, 1]`, one a routed layer, and the tokens' mask `[B, T]`.

    Layers that share a gate each have it here.
    """

    gates: tuple[torch.Tensor, ...] | None = None
    tokens: torch.Tensor | None = None


class RoutedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM that runs a routed graph: soft, to be trained, or hard, to be used.

    Soft (`hard_threshold` None), every block runs and is mixed by its gate. Hard, a block runs for a call if one of the
    tokens has a gate above the threshold, changes those tokens only, and always appends its keys and values; no
    gradient flows. `usage` counts what was active since `reset_usage()` or the last `generate()`.

    A routed layer is one that a gate may skip. `routed_layers` are all of them, `gated_layers` for each gate those that
    it executes or skips together: one, or with `blocks_per_gate` several consecutive ones. `work` is what each routed
    layer counts in an active ratio: 1, or of halves of blocks their share of a whole one.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, base: PreTrainedModel, soft: fx.GraphModule, router_config: RouterConfig) -> None:
        super().__init__(base.config)
        self.generation_config = base.generation_config
        self.graph = soft
        self.router_config = router_config
        self.gated_layers = tuple(gated_layers(soft))
        self.routed_layers = tuple(layer for layers in self.gated_layers for layer in layers)
        self.work = work_of_layers(soft, self.routed_layers, router_config.granularity)
        self.usage = RoutingUsage(self.routed_layers, self.work)
        # Not a submodule: its parameters are those of the graph, under the names of the checkpoint.
        self._base = (base,)
        self._hard: tuple[fx.GraphModule, ...] = ()
        self._thresholds: torch.Tensor | None = None
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for parameter in self.router_parameters():
            parameter.requires_grad_(True)

    @property
    def base(self) -> PreTrainedModel:
        """The untouched model whose parameters the graph shares."""
        return self._base[0]

    @property
    def routers(self) -> dict[int, nn.Module]:
        """The router of every gate, by the index of the first layer that it decides on."""
        return {
            layers.start: self.graph.get_submodule(f"blocks.{name_of(layers)}.router") for layers in self.gated_layers
        }

    @property
    def adapters(self) -> dict[int, nn.Module]:
        """What tokens that skip a layer go through, by its index; empty where that is nothing."""
        skips: dict[int, nn.Module | None] = {}
        for layers in self.gated_layers:
            mixed = self.graph.get_submodule(f"blocks.{name_of(layers)}.block")
            members = [mixed] if len(layers) == 1 else [mixed.get_submodule(str(index)) for index in range(len(layers))]
            skips |= dict(zip(layers, map(skip_of, members), strict=True))
        return {layer: skip for layer, skip in skips.items() if skip is not None}

    def router_parameters(self) -> list[nn.Parameter]:
        """What is trained: routers and adapters."""
        modules = [*self.routers.values(), *self.adapters.values()]
        return [parameter for module in modules for parameter in module.parameters()]

    @property
    def takes_cache(self) -> bool:
        """Whether the graph was traced with keys and values as inputs and outputs."""
        return bool(cache_inputs(self.graph))

    @property
    def hard_thresholds(self) -> list[float] | None:
        """The threshold of every gate, or None while the model is soft."""
        return None if self._thresholds is None else self._thresholds.tolist()

    @property
    def active_ratio(self) -> float:
        """Share of (token, routed layer) pairs that were executed, by their `work`, padding excluded."""
        return self.usage.active_ratio

    @property
    def active_ratio_per_layer(self) -> dict[int, float]:
        """The same for each routed layer."""
        return self.usage.active_ratio_per_layer

    def reset_usage(self) -> None:
        """Count from zero."""
        self.usage = RoutingUsage(self.routed_layers, self.work)

    def set_router_mode(self, hard_threshold: float | Sequence[float] | None) -> None:
        """Hard at a threshold (one for all gates, or one each), or soft with None.

        Raises:
            ConfigError: a threshold is negative, infinite or not a number, or there are not as many as gates.
        """
        if hard_threshold is None:
            self._thresholds = None
            return
        given = hard_threshold if isinstance(hard_threshold, Sequence) else [hard_threshold] * len(self.gated_layers)
        if len(given) != len(self.gated_layers):
            raise ConfigError(f"{len(given)} thresholds for {len(self.gated_layers)} gates; give one, or one each")
        self._thresholds = torch.tensor([check_threshold(value) for value in given])

    def hard_graph(self) -> fx.GraphModule:
        """The lowered graph at the present thresholds (0.5 while the model is soft); it shares the parameters."""
        if not self._hard:
            # Not eval(): the routers are the model's own, and it may be in training.
            self._hard = (lower_gates(harden_gates(self.graph)).train(self.training),)
        (graph,) = self._hard
        threshold = graph.get_buffer("routing_threshold")
        if self._thresholds is None:
            threshold.fill_(0.5)
        else:
            threshold.copy_(self._thresholds)
        return graph

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> RoutedCausalLMOutput:
        """Logits `[B, T, V]` of `input_ids [B, T]` after a cache of P tokens; `attention_mask` is `[B, P + T]`.

        With `labels [B, T]` (-100: ignored) also the language-modelling loss.
        """
        inputs = graph_inputs(self.graph, input_ids, attention_mask, position_ids, past_key_values)
        tokens = inputs[1][:, -input_ids.shape[1] :] != 0
        if self._thresholds is None:
            outputs = self.graph(*inputs)
        else:
            with torch.no_grad():
                outputs = self.hard_graph()(*inputs)
        logits, *rest = outputs
        cut = len(rest) - len(self.gated_layers)
        present = rest[:cut]
        gates = tuple(gate for gate, layers in zip(rest[cut:], self.gated_layers, strict=True) for _ in layers)
        self.usage.update(gates, tokens)

        if use_cache is None:
            use_cache = not self.training and labels is None
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
        return RoutedCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=updated_cache(past_key_values, present) if use_cache and present else None,
            gates=gates,
            tokens=tokens,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `usage` then tells of this generation."""
        self.reset_usage()
        if not self.takes_cache:
            kwargs["use_cache"] = False
        return cast(Any, super()).generate(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep the inputs of blocks only, and run each block again in the backward pass."""
        checkpoint_blocks(self.graph, enabled=True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations, as without `gradient_checkpointing_enable`."""
        checkpoint_blocks(self.graph, enabled=False)

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Write the base, loadable on its own, the routers and their configuration into a folder.

        The tokenizer is not the model's; save it beside.
        """
        from modcompile.artifacts import save_routers  # artifacts reads folders into models, so it imports this module

        folder = Path(save_directory)
        self.base.save_pretrained(folder, *args, **kwargs)
        save_routers(self, folder)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What `to`, `half` and the like do: the base follows, and so does what the trace recorded."""
        from modcompile.routed_graph import trace_again  # routed_graph makes models, so it imports this module

        dtype = self.dtype
        self.base._apply(fn, recurse)
        result = super()._apply(fn, recurse)
        # The hard graph holds buffers of its own and is made again when it is needed next.
        self._hard = ()
        if self.dtype == dtype:
            retarget_device(self.graph, self.device)
        else:
            self.graph = trace_again(self)
        return result


def set_router_mode(model: RoutedForCausalLM, hard_threshold: float | Sequence[float] | None) -> None:
    """Hard at a threshold (one for all gates, or one each), or soft with None."""
    model.set_router_mode(hard_threshold)
