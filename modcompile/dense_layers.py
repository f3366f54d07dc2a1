"""A dense model as its layers see it: the hidden states between them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from modcompile.granularity import Granularity
from modcompile.graph_inputs import graph_inputs
from modcompile.passes.outlined_form import block_calls
from modcompile.routed_graph import trace_layers
from modcompile.text_loss import batches


class DenseLayers:
    """Runs a base model and keeps what stands between its layers, or between their halves, as gates count them."""

    def __init__(self, base: PreTrainedModel, granularity: Granularity) -> None:
        self._graph = trace_layers(base, granularity, use_cache=False).eval()
        calls = block_calls(self._graph.graph)
        first: Any = calls[0].args[0]
        # What the prologue returns is in any order; a block returns the hidden state first.
        self._watched = [(self._graph.get_submodule("prologue"), int(first.args[1]))]
        self._watched += [(self._graph.get_submodule(str(call.target)), 0) for call in calls]

    @property
    def count(self) -> int:
        """Of layers, or halves."""
        return len(self._watched) - 1

    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits `[B, T, V]`, and the hidden states `[B, T, H]` in front of every layer and behind the last.

        Where gradients are on, the logits have one with respect to all of these.
        """
        states: list[torch.Tensor] = []
        with _listening(self._watched, states):
            (logits,) = self._graph(*graph_inputs(self._graph, input_ids, attention_mask))
        return logits, states

    def over(
        self, blocks: Dataset, batch_size: int, title: str
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]:
        """For each batch of a text: which are its tokens, `[B, T]`, and what `run` returns."""
        device = next(self._graph.parameters()).device
        count = -(-blocks.num_rows // batch_size)
        for batch in tqdm(batches(blocks, batch_size, device), title, total=count, delay=2, leave=False):
            yield batch["attention_mask"] != 0, *self.run(batch["input_ids"], batch["attention_mask"])


@contextmanager
def _listening(watched: Sequence[tuple[nn.Module, int]], heard: list[torch.Tensor]) -> Iterator[None]:
    """Collect what modules return at some position; the first is then what gradients begin at."""

    def hook(position: int) -> Callable[..., Any]:
        def returned(_: nn.Module, __: Any, output: Any) -> Any:
            values = list(output)
            if torch.is_grad_enabled() and not values[position].requires_grad:
                values[position] = values[position].detach().requires_grad_()
            heard.append(values[position])
            return tuple(values)

        return returned

    handles = [module.register_forward_hook(hook(position)) for module, position in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
