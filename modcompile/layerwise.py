"""A causal LM whose decoder blocks each choose the precision of their weights."""

import warnings
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

from modcompile.any_precision_folder import is_any_precision_folder, read_any_precision_folder
from modcompile.config import PrecisionRouterConfig
from modcompile.errors import ConfigError
from modcompile.graph_inputs import graph_inputs, updated_cache
from modcompile.passes import choose_precision, insert_precision_branches
from modcompile.passes.outlined_form import block_calls, results
from modcompile.precision_branches import PrecisionCheckpoint, PrecisionWeights
from modcompile.precision_routers import PrecisionRouter, SoftMixer
from modcompile.quantized_folder import read_quantized_folder
from modcompile.routed_graph import trace_outlined


@dataclass
class PrecisionCausalLMOutput(CausalLMOutputWithPast):
    """Adds what the routers decided, one tensor a block.

    In training, the weights of the precisions `[B, 1, P]`; otherwise the bits that each token was computed with,
    int64 `[B, T]`.
    """

    precision_weights: tuple[torch.Tensor, ...] | None = None
    num_bits: tuple[torch.Tensor, ...] | None = None
    tokens: torch.Tensor | None = None


class LayerwiseQuantizeForCausalLM(PreTrainedModel, GenerationMixin):
    """Runs a rewritten graph: all precisions mixed, to train the routers, or one a block, to be used.

    Only the routers train. `forward` is `infer_forward`, and in training mode `train_forward`.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = True

    def __init__(self, checkpoint: PrecisionCheckpoint, config: PrecisionRouterConfig) -> None:
        super().__init__(checkpoint.base.config)
        self.generation_config = checkpoint.base.generation_config
        self.precisions = checkpoint.precisions
        self.router_config = config
        self.checkpoint = checkpoint
        self.base = checkpoint.base.requires_grad_(False)
        dense = trace_outlined(self.base)
        calls = block_calls(dense.graph)
        hidden_size = int(results(calls[0])[0].meta["val"].shape[-1])
        self.routers = nn.ModuleDict(
            {
                str(layer): PrecisionRouter(hidden_size, len(self.precisions), dropout=config.router_dropout)
                for layer in range(len(calls))
            }
        )
        self._weights = PrecisionWeights(checkpoint)
        self._dense = dense
        self._infer_graph = choose_precision(dense, self._weights.branches(dense), self._routers_by_layer())
        self._train_graphs: list[fx.GraphModule] = []
        self.eval()

    @classmethod
    def from_quantized(
        cls,
        quant_model_path: str | PathLike[str],
        precisions: Sequence[int] | None = None,
        trust_remote_code: bool = False,
        **router_options: Any,
    ) -> "LayerwiseQuantizeForCausalLM":
        """Read a folder for some of its precisions, by default all; routers are new.

        It is one of `modcompile.quantize`, or one of any-precision-llm (`modcompile.any_precision_folder`).
        `router_options` are those of `PrecisionRouterConfig`.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged, or of another version.
            CheckpointError: its base can't be read.
            ConfigError: it lacks one of `precisions`, or an option is out of its range.
            UnsupportedModelError: the base can't be traced, or is no chain of decoder blocks.
        """
        if trust_remote_code:
            raise ConfigError("trust_remote_code: code that comes with a checkpoint is never run; leave it False")
        folder = Path(quant_model_path)
        checkpoint: PrecisionCheckpoint
        if is_any_precision_folder(folder):
            checkpoint = read_any_precision_folder(folder, precisions)
        else:
            checkpoint = read_quantized_folder(folder, precisions)
        return cls(checkpoint, PrecisionRouterConfig(**router_options))

    def train_forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PrecisionCausalLMOutput:
        """Logits `[B, T, V]` of all precisions, mixed in every block by the weights of its router."""
        if not self._train_graphs:
            self._train_graphs.append(self._mixing(trace_outlined(self.base, use_cache=False)))
        (graph,) = self._train_graphs
        inputs = graph_inputs(graph, input_ids, attention_mask)
        logits, *weights = graph(*inputs)
        return PrecisionCausalLMOutput(
            loss=_loss(logits, labels, kwargs),
            logits=logits,
            precision_weights=tuple(weights),
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
        cut = len(rest) - len(self.routers)
        return PrecisionCausalLMOutput(
            loss=_loss(logits, labels, kwargs),
            logits=logits,
            past_key_values=updated_cache(past_key_values, rest[:cut]) if use_cache is not False else None,
            num_bits=tuple(rest[cut:]),
            tokens=inputs[1][:, -input_ids.shape[1] :] != 0,
        )

    def forward(self, *args: Any, **kwargs: Any) -> PrecisionCausalLMOutput:
        """`infer_forward`, or `train_forward` in training mode."""
        return self.train_forward(*args, **kwargs) if self.training else self.infer_forward(*args, **kwargs)

    def export_graph(self) -> fx.GraphModule:
        """The graph of `infer_forward` on the codes themselves, for `modcompile.export.build_model`.

        Raises:
            UnsupportedModelError: they are codes of look-up tables.
        """
        graph = choose_precision(self._dense, self._weights.packed_branches(self._dense), self._routers_by_layer())
        graph.get_buffer("precision_bias").copy_(self._infer_graph.get_buffer("precision_bias"))
        return graph.eval()

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
        wanted = [num_bits] * len(self.routers) if isinstance(num_bits, int) else list(num_bits)
        if len(wanted) != len(self.routers) or any(bits not in self.precisions for bits in wanted):
            raise ConfigError(
                f"{num_bits} is not one of {', '.join(map(str, self.precisions))} for each of the "
                f"{len(self.routers)} blocks"
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
        """As in transformers; the prompt decides for the prompt, and each new token for itself."""
        return cast(Any, super()).generate(*args, **kwargs)

    def _mixing(self, dense: fx.GraphModule) -> fx.GraphModule:
        return insert_precision_branches(dense, self._weights.branches(dense), self._routers_by_layer(), SoftMixer())

    def _routers_by_layer(self) -> dict[int, nn.Module]:
        return {int(layer): router for layer, router in self.routers.items()}


def _loss(logits: torch.Tensor, labels: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor | None:
    if labels is None:
        return None
    count = options.get("num_items_in_batch")
    loss: torch.Tensor = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=count)
    return loss
