"""Graphs of small modules, with the node metadata that passes look at."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import fx, nn
from torch._ops import OpOverload

from modcompile.passes import drop_guards

BATCH, TOKENS, PAST = 3, 5, 7
_DYNAMIC = {BATCH, TOKENS, PAST, PAST + TOKENS}


def traced(module: nn.Module, *examples: torch.Tensor) -> fx.GraphModule:
    """The flat graph of `module`; free is every dimension that has one of the sizes above in an example."""
    free = torch.export.Dim.AUTO
    shapes = tuple({dim: free for dim, size in enumerate(example.shape) if size in _DYNAMIC} for example in examples)
    sized = _Sized(module.eval(), examples)
    with torch.no_grad():
        ep = torch.export.export(sized, examples, dynamic_shapes=(shapes,), strict=False)
    gm = ep.module()
    assert isinstance(gm, fx.GraphModule)
    return drop_guards(gm)


class _Sized(nn.Module):
    """Tells the tracer that dimensions of one size in the examples are of one size always."""

    def __init__(self, module: nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.module = module
        self.places = [
            (size, index, dim)
            for size in sorted(_DYNAMIC)
            for index, example in enumerate(examples)
            for dim, actual in enumerate(example.shape)
            if actual == size
        ]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes: dict[int, int] = {}
        for size, index, dim in self.places:
            actual = inputs[index].shape[dim]
            torch._check(actual == sizes.setdefault(size, actual))
        if {TOKENS, PAST, PAST + TOKENS} <= sizes.keys():
            torch._check(sizes[PAST + TOKENS] == sizes[PAST] + sizes[TOKENS])
        outputs: tuple[torch.Tensor, ...] = self.module(*inputs)
        return outputs


def calls(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator is called, under its short name: `mul`, `rms_norm`, `Attention`."""
    return Counter(
        node.target._schema.name.partition("::")[2]
        for node in gm.graph.nodes
        if node.op == "call_function" and isinstance(node.target, OpOverload)
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Function = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
"""Of a `Run`, whose parameters it may use, and tensors."""


class Run(nn.Module):
    """A function as a module with flat inputs."""

    def __init__(self, function: Function, weight: torch.Tensor | None = None, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(1) if weight is None else weight)
        self.inner = inner or nn.Identity()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.function(self, *inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)
