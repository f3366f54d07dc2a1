"""A causal LM whose decoder blocks each choose the precision of their weights."""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from modcompile.artifacts import is_routed_folder, load_depth_routers, read_router_config
from modcompile.config import RouterConfig, check_threshold
from modcompile.errors import ConfigError
from modcompile.gradient_checkpointing import checkpoint_blocks
from modcompile.graph_inputs import graph_inputs, updated_cache
from modcompile.precision_branches import PrecisionCheckpoint
from modcompile.precision_config import PrecisionRouterConfig
from modcompile.precision_folder import read_precisions
from modcompile.precision_graphs import PrecisionGraphs
from modcompile.precision_output import PrecisionCausalLMOutput
from modcompile.precision_router_files import (
    has_precision_routers,
    load_precision_routers,
    read_precision_router_config,
)
from modcompile.precision_routers import PrecisionRouter
from modcompile.tracing import eval_mode


class LayerwiseQuantizeForCausalLM(PreTrainedModel, GenerationMixin):
    """Runs a rewritten graph: all precisions mixed, to train the routers, or one a block, to be used.

    Only the routers train. `forward` is `infer_forward`, and in training mode `train_forward`. With `depth`, blocks
    also have gates that skip them; as a choice of their routers that has 0 bits.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True

    def __init__(
        self, checkpoint: PrecisionCheckpoint, config: PrecisionRouterConfig, depth: RouterConfig | None = None
    ) -> None:
        super().__init__(checkpoint.base.config)
        self.generation_config = checkpoint.base.generation_config
        self.precisions = checkpoint.precisions
        self.router_config, self.depth_config = config, depth
        self.base = checkpoint.base.requires_grad_(False)
        self._graphs = PrecisionGraphs(checkpoint, config, depth)
        # Modules of this one, so that their parameters are its own.
        self._routers, self._depth_routers, self._adapters = (
            nn.ModuleDict({str(layer): module for layer, module in modules.items()})
            for modules in (self._graphs.routers, self._graphs.depth_routers, self._graphs.adapters)
        )
        self._infer_graph = self._graphs.inference()
        self._train_graph: fx.GraphModule | None = None
        self.eval()

    @classmethod
    def from_quantized(
        cls,
        quant_model_path: str | PathLike[str],
        precisions: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        *,
        depth: RouterConfig | None = None,
        device: str | torch.device = "cpu",
        **router_options: Any,
    ) -> "LayerwiseQuantizeForCausalLM":
        """Read a folder for some of its precisions.

        It is one of `modcompile.quantize`, or one of any-precision-llm (`modcompile.any_precision_folder`). If routers
        were trained in it, they are read too, and `precisions` are by default theirs, else all. With `router_options`
        (those of `PrecisionRouterConfig`), or precisions that they do not know, routers are new. The same holds for
        depth gates and `depth`.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged, or of another version.
            CheckpointError: its base can't be read.
            ConfigError: it lacks one of `precisions`, or an option is out of its range.
            UnsupportedModelError: the base can't be traced, or is no chain of decoder blocks.
        """
        if trust_remote_code:
            raise ConfigError("trust_remote_code: code that comes with a checkpoint is never run; leave it False")
        folder = Path(quant_model_path)
        config, known = PrecisionRouterConfig(**router_options), list[int]()
        if has_precision_routers(folder) and not router_options:
            config, known = read_precision_router_config(folder)
            precisions = known if precisions is None else precisions
        checkpoint = read_precisions(folder, precisions)
        base: Any = checkpoint.base
        base.to(device)
        stored_depth = read_router_config(folder) if depth is None and is_routed_folder(folder) else None
        model = cls(checkpoint, config, depth or stored_depth)
        if set(checkpoint.precisions) <= set(known):
            load_precision_routers(model.routers, folder, known, checkpoint.precisions)
        if stored_depth is not None:
            load_depth_routers(model.depth_routers, folder, model.adapters)
        return model

    @property
    def routers(self) -> dict[int, PrecisionRouter]:
        """The router of every block, by its layer."""
        return self._graphs.routers

    @property
    def depth_routers(self) -> dict[int, nn.Module]:
        """The routers of the depth gates, by their layers; none without."""
        return self._graphs.depth_routers

    @property
    def adapters(self) -> dict[int, nn.Module]:
        """What tokens that skip a layer go through, by its index; empty where that is nothing."""
        return self._graphs.adapters

    def train_forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        hard: bool = False,
        **kwargs: Any,
    ) -> PrecisionCausalLMOutput:
        """Logits `[B, T, V]` of all precisions, mixed in every block by the weights of its router.

        While `hard`, a row (or token) has what it chose alone, whatever the other rows of the batch did, and is skipped
        where its gate is at most 0.5.
        """
        graph = self._mixing()
        inputs = graph_inputs(graph, input_ids, attention_mask)
        self._graphs.mixer.hard = self._graphs.gate.hard = hard
        logits, *rest = graph(*inputs)
        first_gate = len(rest) - len(self._depth_routers)
        first_weight = first_gate - len(self._routers)  # before them, keys and values of which nobody makes a cache
        return PrecisionCausalLMOutput(
            loss=_loss(logits, labels, kwargs),
            logits=logits,
            precision_weights=tuple(rest[first_weight:first_gate]),
            gates=dict(zip(self.depth_routers, rest[first_gate:], strict=True)),
            tokens=inputs[1] != 0,
        )

    def infer_forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> PrecisionCausalLMOutput:
        """Logits `[B, T, V]` of `input_ids [B, T]` after a cache of P tokens, every block at one precision."""
        inputs = graph_inputs(self._infer_graph, input_ids, attention_mask, position_ids, past_key_values)
        with torch.no_grad():
            logits, *rest = self._infer_graph(*inputs)
        cut = len(rest) - len(self._routers)
        return PrecisionCausalLMOutput(
            loss=_loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=updated_cache(past_key_values, rest[:cut]) if use_cache is not False else None,
            num_bits=tuple(rest[cut:]),
            tokens=inputs[1][:, -input_ids.shape[1] :] != 0,
        )

    # The HF Trainer reads from the names which columns of a data set to pass.
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrecisionCausalLMOutput:
        """`infer_forward`, or `train_forward` in training mode."""
        called = self.train_forward if self.training else self.infer_forward
        return called(input_ids, attention_mask, labels=labels, **kwargs)

    def export_graph(self) -> fx.GraphModule:
        """The graph of `infer_forward` on the codes themselves, for `modcompile.export.build_model`.

        Raises:
            UnsupportedModelError: they are codes of look-up tables.
        """
        return self._like_the_present(self._graphs.export())

    def rounded_graph(self) -> fx.GraphModule:
        """The graph of `infer_forward` that rounds activations to 8 bits, as the exported model does on a CPU.

        Raises:
            UnsupportedModelError: the weights are look-up tables, which are not exported.
        """
        return self._like_the_present(self._graphs.inference(round_activations=True))

    def _like_the_present(self, graph: fx.GraphModule) -> fx.GraphModule:
        for name, buffer in graph.named_buffers():
            if name in ("precision_bias", "routing_threshold"):
                buffer.copy_(self._infer_graph.get_buffer(name))
        return graph.train(self.training)

    @property
    def hard_thresholds(self) -> list[float]:
        """The threshold of every depth gate; none without."""
        thresholds: list[float] = (
            self._infer_graph.get_buffer("routing_threshold").tolist() if self.depth_routers else []
        )
        return thresholds

    def set_hard_threshold(self, hard_threshold: float | Sequence[float]) -> None:
        """The threshold above which `infer_forward` opens a depth gate, or one each: 0 executes all, above 1 skips all.

        Raises:
            ConfigError: it is negative, infinite or not a number, or there are not as many as depth gates.
        """
        count = len(self._depth_routers)
        given = list(hard_threshold) if isinstance(hard_threshold, Sequence) else [hard_threshold] * count
        if not count or len(given) != count:
            raise ConfigError(f"{len(given)} thresholds for {count} depth gates; give one, or one each")
        self._infer_graph.get_buffer("routing_threshold").copy_(torch.tensor([check_threshold(t) for t in given]))

    def set_precision_bias(self, bias: torch.Tensor | None) -> None:
        """What `infer_forward` adds to the routers' logits, `[blocks, P]` or broadcast to it; None for nothing."""
        buffer = self._infer_graph.get_buffer("precision_bias")
        buffer.copy_(torch.zeros_like(buffer) if bias is None else bias.to(buffer).expand_as(buffer))

    def fix_precision(self, num_bits: int | Sequence[int] | None) -> None:
        """Have `infer_forward` compute all blocks with so many bits, or each with its own; None asks the routers.

        Raises:
            ConfigError: it is none of the model's precisions, or there are not as many as blocks.
        """
        if num_bits is None:
            self.set_precision_bias(None)
            return
        wanted = [num_bits] * len(self._routers) if isinstance(num_bits, int) else list(num_bits)
        if len(wanted) != len(self._routers) or any(bits not in self.precisions for bits in wanted):
            raise ConfigError(
                f"{num_bits} is not one of {', '.join(map(str, self.precisions))} for each of the "
                f"{len(self._routers)} blocks"
            )
        bias = torch.zeros(len(wanted), len(self.precisions))
        for row, bits in zip(bias, wanted, strict=True):
            row[self.precisions.index(bits)] = torch.inf
        self.set_precision_bias(bias)

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """What a training changes: the parameters of the routers, unless more was unfrozen."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_frozen_parameters(self) -> list[nn.Parameter]:
        """What a training leaves alone: those of the base."""
        return [parameter for parameter in self.parameters() if not parameter.requires_grad]

    def unfreeze_original_parameters(self) -> None:
        """Let a training change the parameters of the base, too; quantized weights stay as they are."""
        warnings.warn(
            "the base's parameters are unfrozen: a training now changes what the quantized weights were made to fit",
            stacklevel=2,
        )
        self.base.requires_grad_(True)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, amid a training too; the prompt decides for the prompt, each new token for itself."""
        with eval_mode(self) if self.training else nullcontext():
            return cast(Any, super()).generate(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keep the inputs of blocks only, and run each block again in the backward pass."""
        checkpoint_blocks(self._mixing(), enabled=True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations, as without `gradient_checkpointing_enable`."""
        checkpoint_blocks(self._mixing(), enabled=False)

    def _mixing(self) -> fx.GraphModule:
        """The graph of `train_forward`, made when it is first asked for."""
        if self._train_graph is None:
            self._train_graph = self._graphs.training().train(self.training)
        return self._train_graph


def _loss(logits: torch.Tensor, labels: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor | None:
    if labels is None:
        return None
    count = options.get("num_items_in_batch")
    loss: torch.Tensor = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
    return loss
