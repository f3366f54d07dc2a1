"""Make two blocks of each: one that attends, and one that treats every token by itself.

Before::

    hidden, key, value = blocks.3(hidden, *shared, past_key, past_value)

        block:  …  mid = add(hidden, linear(attention(…)));  y = add(mid, mlp(norm(mid)))

After::

    mid, key, value = blocks.6(hidden, *shared, past_key, past_value)
    hidden = blocks.7(mid)

Block 2 i is the attention of layer i and block 2 i + 1 its MLP, each with the sum behind it, so that a gate can skip
the one without the other. `mid` is found from the graph, not by a name: the last value of the hidden state's shape that
everything behind it is computed from alone, and that no key or value needs.
"""

import operator

from torch import fx, nn

from modcompile.errors import UnsupportedModelError
from modcompile.passes.extract_subgraph import extract_subgraph, find_inputs, is_symbolic_int
from modcompile.passes.find_linears import find_linears
from modcompile.passes.graph_patterns import shape_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, results


def split_blocks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the outlined form with two blocks for each of `gm`, which has no groups and no gates yet.

    Keeps equal: every output, bit for bit. Parameters are shared with `gm`.

    Raises:
        UnsupportedModelError: in a block, attention and MLP don't come one after the other.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    modules = called_modules(gm)
    calls = block_calls(graph)
    halves = [_split(str(call.target), modules.pop(str(call.target))) for call in calls]
    for index, (call, (attention, mlp)) in enumerate(zip(calls, halves, strict=True)):
        first, second = f"blocks.{2 * index}", f"blocks.{2 * index + 1}"
        modules |= {first: attention, second: mlp}
        call.target = first
        hidden = results(call)[0]
        users = list(hidden.users)
        with graph.inserting_after(results(call)[-1]):
            following = graph.call_module(second, (hidden,))
        with graph.inserting_after(following):
            after = graph.call_function(operator.getitem, (following, 0))
        after.meta = dict(hidden.meta)
        for user in users:
            user.replace_input_with(hidden, after)
    graph.lint()
    return LazyGraphModule(modules, graph)


def _split(name: str, block: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule]:
    assert isinstance(block, fx.GraphModule)
    inputs = block.graph.find_nodes(op="placeholder")
    (output,) = block.graph.find_nodes(op="output")
    hidden, *cache = output.args[0]
    body = [node for node in block.graph.nodes if node.op == "call_function" and not is_symbolic_int(node)]
    products = {use.node for use in find_linears(block.graph)}
    for mid in reversed(body):
        if mid is hidden or shape_of(mid) != shape_of(inputs[0]):
            continue
        tail = _behind(mid, body)
        if hidden in tail and not tail & {*cache} and tail & products and find_inputs(_ordered(tail, body)) == [mid]:
            head = [node for node in body if node not in tail]
            attention = extract_subgraph(block, head, inputs, [mid, *cache])
            return attention, extract_subgraph(block, _ordered(tail, body), [mid], [hidden])
    raise UnsupportedModelError(
        f"{name} can't be split: no value in it is all that its MLP is computed from; route whole blocks"
    )


def _behind(first: fx.Node, body: list[fx.Node]) -> set[fx.Node]:
    """What is computed from a node, and from nothing in front of it but what it is computed from, too."""
    found = {first}
    for node in body:
        if any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found - {first}


def _ordered(nodes: set[fx.Node], body: list[fx.Node]) -> list[fx.Node]:
    return [node for node in body if node in nodes]
