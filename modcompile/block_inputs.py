"""What the decoder blocks of an outlined graph get to see of a text, block after block.

All sequences go through a block before the next block's turn comes, so that it can be changed in between; what is held
is one hidden state a sequence, and what the blocks share.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from modcompile.graph_inputs import graph_inputs
from modcompile.passes.extract_subgraph import extract_subgraph
from modcompile.passes.find_linears import LinearUse
from modcompile.passes.outlined_form import block_calls
from modcompile.text_loss import batches

if TYPE_CHECKING:  # it takes half a second to import
    from datasets import Dataset

_EPSILON = 1e-6  # as in a norm: a hidden state may be zero


class BlockInputs:
    """The sequences of a text on their way through the blocks."""

    def __init__(self, gm: fx.GraphModule, sequences: "Dataset") -> None:
        """Run what comes before the blocks of `gm`, traced without a cache.

        `sequences` are as `tokenize_and_pack` makes them.
        """
        calls = block_calls(gm.graph)
        nodes = list(gm.graph.nodes)
        inputs = list(gm.graph.find_nodes(op="placeholder"))
        before = [node for node in nodes[: nodes.index(calls[0])] if node not in inputs]
        shared = list(dict.fromkeys(node for call in calls for node in _arguments(call)[1:]))
        # Gemma makes the weight of its last norm there, too: 1 more than the parameter.
        heads = gm.graph.find_nodes(op="call_module", target="epilogue")
        shared += [node for head in heads for node in _arguments(head)[1:] if node in before and node not in shared]
        prologue = extract_subgraph(gm, before, inputs, [_arguments(calls[0])[0], *shared])
        self._hidden: list[torch.Tensor] = []
        self._shared: list[dict[fx.Node, torch.Tensor]] = []
        with torch.no_grad():
            for batch in batches(sequences, 1, next(gm.parameters()).device):
                hidden, *rest = prologue(*graph_inputs(gm, batch["input_ids"], batch["attention_mask"]))
                self._hidden.append(hidden)
                self._shared.append(dict(zip(shared, rest, strict=True)))

    def suit(self, call: fx.Node) -> bool:
        """Whether a call, such as that of a head, takes besides a hidden state only what is known before the blocks."""
        return len(_arguments(call)) == len(call.args) and set(_arguments(call)[1:]) <= set(self._shared[0])

    def hessians(
        self, call: fx.Node, block: fx.GraphModule, uses: Sequence[LinearUse], *, seed: int = 0
    ) -> dict[LinearUse, torch.Tensor]:
        """For each product the sum over all tokens of ``weight · x xᵀ``, float64 `[K, K]`, of its inputs `x [K]`.

        A token weighs as much as its product counts in the block's output: that of the token that all others attend to
        counts in the output of all of them. The weight is the squared norm of the gradient of a random sum of the
        output's elements (standard normal, each token's divided by the root mean square of its hidden state, as the
        next norm will do): on average, the squared norm of the Jacobian.
        """
        hessians: dict[LinearUse, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        watched = {node for use in uses for node in (use.x, use.node)}
        for hidden, *rest in self._inputs(call):
            recorder = _Recorder(block, watched)
            with torch.enable_grad():
                output, *_ = recorder.run(hidden.detach().requires_grad_(), *rest)
            probe = torch.randn(output.shape, generator=generator).to(output)
            probe *= (output.detach().square().mean(-1, keepdim=True) + _EPSILON).rsqrt()
            products = [recorder.values[use.node] for use in uses]
            for use, gradient in zip(uses, torch.autograd.grad(output, products, probe), strict=True):
                x = recorder.values[use.x].detach() * gradient.norm(dim=-1, keepdim=True)
                x = x.flatten(0, -2)
                # A sequence is summed up in float32, which is fast, and all of them in float64.
                hessians[use] = (x.T @ x).double() + hessians.get(use, 0)
        return hessians

    @torch.no_grad()
    def advance(self, call: fx.Node, block: fx.GraphModule) -> None:
        """Go on to what `block` makes of the hidden states, called as `call` is."""
        self._hidden = [block(*inputs)[0] for inputs in self._inputs(call)]

    def _inputs(self, call: fx.Node) -> Iterator[tuple[torch.Tensor, ...]]:
        for hidden, shared in zip(self._hidden, self._shared, strict=True):
            yield hidden, *(shared[node] for node in _arguments(call)[1:])


class _Recorder(fx.Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, block: fx.GraphModule, watched: set[fx.Node]) -> None:
        super().__init__(block)
        self.values: dict[fx.Node, torch.Tensor] = {}
        self._watched = watched

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self._watched:
            self.values[n] = value
        return value


def _arguments(call: fx.Node) -> list[fx.Node]:
    return [argument for argument in call.args if isinstance(argument, fx.Node)]
