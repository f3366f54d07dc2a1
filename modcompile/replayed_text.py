"""A routed model run hard on one text again and again, each time from the first block that differs on."""

from collections.abc import Iterator, Sequence
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
class Part:
    """What a batch of B sequences came to; means over all sequences are those over all tokens, of whatever length."""

    divergence: torch.Tensor
    """`[B]`: KL(dense ‖ routed), in nats: of all predicted tokens of the sequence, over those of the mean sequence."""
    active_ratio: torch.Tensor
    """`[B]`: what the sequence executes, by its work, over what there is to execute in the mean sequence."""
    values: dict[fx.Node, Any]
    """What the graph's nodes held."""


@dataclass(frozen=True)
class Replay:
    """A run at some thresholds."""

    parts: tuple[Part, ...]
    """By batch."""

    @property
    def divergence(self) -> float:
        """KL(dense ‖ routed), the mean over predicted tokens, in nats."""
        return float(torch.cat([part.divergence for part in self.parts]).mean())

    @property
    def active_ratio(self) -> float:
        """Share of (token, routed layer) pairs that were executed, by their work."""
        return float(torch.cat([part.active_ratio for part in self.parts]).mean())


class ReplayedText:
    """`model` on `blocks`, with the usage and the router mode of its last run.

    Holds the dense model's logits, in float16, and for every run that is kept the hidden states between all blocks.
    With `bf16`, products are computed in bfloat16.
    """

    def __init__(self, model: RoutedForCausalLM, blocks: Dataset, *, batch_size: int, bf16: bool = False) -> None:
        self._model, self._bf16 = model, bf16
        self._batches = list(batches(blocks, batch_size, model.device))
        self._tokens = sum(int((batch["attention_mask"] != 0).sum()) for batch in self._batches)
        self.sequences = blocks.num_rows
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

    def run(self, thresholds: Sequence[float]) -> Replay:
        """At `thresholds`, from the beginning."""
        return Replay(tuple(self._part(index, thresholds, None, 0) for index in range(len(self._batches))))

    def parts(self, thresholds: Sequence[float], before: Replay, gate: int) -> Iterator[Part]:
        """At `thresholds` that differ from those of `before` in that of `gate` alone, from there on; batch by batch."""
        for index, earlier in enumerate(before.parts):
            yield self._part(index, thresholds, earlier, gate)

    def _part(self, index: int, thresholds: Sequence[float], earlier: Part | None, gate: int) -> Part:
        batch = self._batches[index]
        values, logits = self._of_batch(index, thresholds, earlier, gate)
        if earlier is not None and values is earlier.values:
            return earlier
        is_token, predicted = batch["attention_mask"] != 0, _is_predicted(batch)
        lost = torch.zeros(predicted.shape, dtype=torch.float64, device=predicted.device)
        lost[predicted] = divergences(logits, self._dense[index], predicted).double()
        executed = torch.stack([(values[mask].squeeze(-1).bool() & is_token).sum(-1) for mask in self._masks], -1).cpu()
        spent = executed.double() @ self._work.double()
        return Part(
            lost.sum(-1).cpu() * (self.sequences / self._predicted),
            spent * (self.sequences / (self._tokens * float(self._work.sum()))),
            values,
        )

    @torch.no_grad()
    def _of_batch(
        self, index: int, thresholds: Sequence[float], earlier: Part | None = None, gate: int = 0
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
