"""Rewrite a block of the outlined form, or every block of a group.

Before::

    y, key_2, value_2 = 0(hidden, …);  hidden, key_3, value_3 = 1(y, …)

After, with an input that all rewritten blocks take::

    y, key_2, value_2 = 0(hidden, …, is_open);  hidden, key_3, value_3 = 1(y, …, is_open)
"""

from collections.abc import Callable

from torch import fx

from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import copy_graph, is_group


def map_blocks(
    block: fx.GraphModule, rewrite: Callable[[fx.GraphModule], fx.GraphModule], new_input: str | None = None
) -> fx.GraphModule:
    """Return what `rewrite` makes of a block; of a group, a group of what it makes of each member.

    Rewritten blocks return what the blocks did, and take what they did; then, if it has a name, `new_input`.
    """
    if not is_group(block):
        return rewrite(block)
    graph, outputs = copy_graph(block)
    calls = graph.find_nodes(op="call_module")
    if new_input is not None:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            added = graph.placeholder(new_input)
        for call in calls:
            call.args += (added,)
    graph.output(outputs)
    members = {}
    for call in calls:
        member = block.get_submodule(str(call.target))
        assert isinstance(member, fx.GraphModule)
        members[str(call.target)] = rewrite(member)
    return LazyGraphModule(members, graph)
