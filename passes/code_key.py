"""Tell whether two modules run the same code, whatever their parameters hold and their nodes are called."""

from typing import Any

from torch import fx, nn

from modcompile.passes.extract_subgraph import get_attribute


def code_key(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes: equal for two modules that differ in nothing but the values of their parameters."""
    if not isinstance(module, fx.GraphModule):
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items())
        return type(module).__qualname__, repr(module), shapes
    numbers = {node: index for index, node in enumerate(module.graph.nodes)}

    def entry(node: fx.Node) -> tuple[Any, ...]:
        target = "" if node.op == "placeholder" else str(node.target)
        args = str(fx.node.map_arg((node.args, node.kwargs), lambda arg: f"%{numbers[arg]}"))
        inner: Any = None
        if node.op == "call_module":
            inner = code_key(module.get_submodule(target))
        elif node.op == "get_attr":
            value = get_attribute(module, target)
            # A module is the body of a higher-order operator.
            inner = code_key(value) if isinstance(value, nn.Module) else (tuple(value.shape), value.dtype)
        return node.op, target, args, inner

    return tuple(entry(node) for node in module.graph.nodes)
