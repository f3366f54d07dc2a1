"""Make one block of several consecutive ones, so that they can share a gate.

Before::

    hidden, key_2, value_2 = blocks.2(hidden, *shared, past_key_2, past_value_2)
    hidden, key_3, value_3 = blocks.3(hidden, *shared, past_key_3, past_value_3)

After::

    hidden, key_2, value_2, key_3, value_3 = blocks.2-3(
        hidden, *shared, past_key_2, past_value_2, past_key_3, past_value_3
    )

where blocks.2-3 is a *group*: a graph of its own that makes the calls above, of its children `0` and `1`.
"""

from collections.abc import Iterable, Sequence

from torch import fx

from modcompile.layer_ranges import name_of
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import (
    NUM_TOKEN_INPUTS,
    block_calls,
    called_modules,
    copy_graph,
    getitems,
    results,
)


def group_blocks(gm: fx.GraphModule, groups: Iterable[range]) -> fx.GraphModule:
    """Return the outlined form with the blocks of each of `groups`, ranges of layers, as one.

    A range of one layer leaves its block as it is. `gm` has no groups and no gates yet; blocks are shared, not copied.

    Keeps equal: every output, bit for bit.
    """
    graph, outputs = copy_graph(gm)
    graph.output(outputs)
    modules = called_modules(gm)
    calls = block_calls(graph)
    for layers in groups:
        if len(layers) == 1:
            continue
        members = calls[layers.start : layers.stop]
        blocks = {str(index): modules.pop(str(call.target)) for index, call in enumerate(members)}
        name = f"blocks.{name_of(layers)}"
        modules[name] = LazyGraphModule(blocks, _join(members, name))
    graph.lint()
    return LazyGraphModule(modules, graph)


def _join(members: Sequence[fx.Node], name: str) -> fx.Graph:
    """Replace the calls by one call of `name`, in place, and return the graph that makes them."""
    outer = members[0].graph
    pasts = set(outer.find_nodes(op="placeholder")[NUM_TOKEN_INPUTS:])
    made = {value for call in members for value in results(call)}
    taken = [arg for arg in dict.fromkeys(arg for call in members for arg in call.all_input_nodes) if arg not in made]
    # The members may differ in what they share with the other blocks: each its own attention mask, say.
    inputs = sorted(taken, key=pasts.__contains__)

    inner = fx.Graph()
    env = {node: inner.placeholder(node.name) for node in inputs}
    for index, call in enumerate(members):
        values = results(call)
        again = inner.call_module(str(index), tuple(env[arg] for arg in call.all_input_nodes))
        env.update(zip(values, getitems(again, len(values)), strict=True))
    returned = [results(members[-1])[0], *(value for call in members for value in results(call)[1:])]
    inner.output(tuple(env[value] for value in returned))

    with outer.inserting_before(members[0]):
        values = getitems(outer.call_module(name, tuple(inputs)), len(returned))
    for old, new in zip(returned, values, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    for call in reversed(members):
        for node in (*results(call), call):
            outer.erase_node(node)
    return inner
