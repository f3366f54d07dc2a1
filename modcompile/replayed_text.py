"""A routed model run hard on one text again and again, each time from the first block that differs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import fx

from modcompile.distillation import divergences
from modcompile.graph_inputs import graph_inputs
from modcompile.modeling import RoutedForCausalLM
from modcompile.text_loss import batches

_IGNORED = -100  # as in the labels of `tokenize_and_pack`


@dataclass(frozen=True)
class _Part:
    """What a batch came to: nats in all, the tokens that each gate executed, and what the graph's nodes held."""

    lost: float
    executed: torch.Tensor
    values: dict[fx.Node, Any]


@dataclass(frozen=True)
class Replay:
    """A run at some thresholds."""

    divergence: float
    """KL(dense ‖ routed), the mean over predicted tokens, in nats."""
    active_ratio: float
    """Share of (token, routed layer) pairs that were executed, by their work."""
    parts: tuple[_Part, ...]
    """By batch."""


class ReplayedText:
    """`model` on `blocks`, with the usage and the router mode of its last run.

    Holds the dense model's logits, in float16, and for every run that is kept the hidden states between all blocks.
    With `bf16`, products are computed in bfloat16.
    """

    def __init__(self, model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int, bf16: bool = False) -> None:
        self._model, self._bf16 = model, bf16
        self._batches = list(batches(blocks, batch_size, model.device))
        self._tokens = sum(int((batch["attention_mask"] != 0).sum()) for batch in self._batches)
        self._predicted = sum(int(_is_predicted(batch).sum()) for batch in self._batches)
        self._work = torch.tensor([float(sum(model.work[layer] for layer in layers)) for layers in model.gated_layers])
        graph = model.hard_graph().graph
        (returned,) = graph.output_node().args
        assert isinstance(returned, Sequence)
        self._logits: Any = returned[0]
        self._masks: list[Any] = list(returned[-len(model.gated_layers) :])
        self._nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
        self._starts = [self._nodes.index(mask.args[0]) for mask in self._masks]
        self._behind = set(self._nodes[max(map(self._nodes.index, self._masks)) + 1 :])
        # What hands thresholds to the blocks is run for all of them at once, so every time.
        (threshold,) = (node for node in self._nodes if node.target == "routing_threshold")
        shared = [threshold, *threshold.users]
        self._inputs = [*shared, *(user for node in shared[1:] for user in node.users)]
        self._dense = [self._of_batch(index, [0.0] * len(self._work))[1].half() for index in range(len(self._batches))]

    def run(self, thresholds: Sequence[float], before: Replay | None = None, gate: int = 0) -> Replay:
        """At `thresholds`; after a run that differs from it in the threshold of `gate` alone, from there on only."""
        parts = []
        for index, batch in enumerate(self._batches):
            earlier = None if before is None else before.parts[index]
            values, logits = self._of_batch(index, thresholds, earlier, gate)
            if earlier is not None and values is earlier.values:
                parts.append(earlier)
                continue
            is_token = batch["attention_mask"] != 0
            executed = torch.stack([(values[mask].squeeze(-1).bool() & is_token).sum() for mask in self._masks]).cpu()
            lost = divergences(logits, self._dense[index], _is_predicted(batch)).double().sum()
            parts.append(_Part(float(lost), executed, values))
        spent = torch.stack([part.executed for part in parts]).sum(0).double() @ self._work.double()
        return Replay(
            sum(part.lost for part in parts) / self._predicted,
            float(spent / (self._tokens * self._work.sum())),
            tuple(parts),
        )

    @torch.no_grad()
    def _of_batch(
        self, index: int, thresholds: Sequence[float], earlier: _Part | None = None, gate: int = 0
    ) -> tuple[dict[fx.Node, Any], torch.Tensor]:
        """What the nodes hold, and the logits; the very values of `earlier` if `gate` decides as it did."""
        self._model.set_router_mode(thresholds)
        graph, batch = self._model.hard_graph(), self._batches[index]
        interpreter = fx.Interpreter(graph, garbage_collect_values=False)
        if earlier is None:
            given = graph_inputs(graph, batch["input_ids"], batch["attention_mask"])
            placeholders = graph.graph.find_nodes(op="placeholder")
            values, todo = dict(zip(placeholders, given, strict=True)), self._nodes
        else:
            start = self._starts[gate]
            values, todo = dict(earlier.values), [*self._inputs, *self._nodes[start:]]
        interpreter.env = values
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bf16):
            for node in todo:
                values[node] = interpreter.run_node(node)
                if earlier is not None and node is self._masks[gate] and values[node].equal(earlier.values[node]):
                    return earlier.values, torch.empty(0)
        # Not the logits, nor anything else from behind the last block.
        return {node: value for node, value in values.items() if node not in self._behind}, values[self._logits]


def _is_predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["labels"][:, 1:] != _IGNORED
