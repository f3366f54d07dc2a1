"""Give decoder blocks a branch for each precision, of which a router picks one for every call.

Before::

    hidden, key, value = blocks.i(hidden, *shared, past_key, past_value)

After, with the buffer `precision_bias [R, P]` of the graph (zeros), a row of it for each routed block::

    token_mask, *biases = precision_inputs(input_ids, attention_mask, precision_bias)
    hidden, key, value, choice = blocks.i(hidden, *shared, past_key, past_value, token_mask, bias)

where blocks.i is now, with P branches and `router_logits [B, P]`::

    is_0, …, is_P-1, choice = decide(hidden, token_mask, bias)
    values = cond(is_0, branch_0, branch_1)(hidden, …)
    values = cond(is_2, branch_2, keep)(hidden, …, *values)
    …

    decide:  the precision of each sequence is the argmax of router_logits + bias; the call's is the highest of them
    keep:    returns clones of `values`

and the choices of the routed blocks (int64 `[B, T]`, in bits) are the last outputs of the graph. The
branches stand one `cond` deep, side by side: ONNX Runtime prepares no quantized weight that lies deeper. It is the form
for inference.
"""

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from modcompile.passes.insert_precision_branches import TokenMask
from modcompile.passes.outlined_form import block_calls, called_modules, copy_graph, results

_cond = torch.ops.higher_order.cond


class PrecisionInputs(nn.Module):
    """What the decisions of all layers share: the mask of tokens `[B, T, 1]`, and the bias `[P]` of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token_mask = TokenMask()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, precision_bias: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return self.token_mask(input_ids, attention_mask), *torch.unbind(precision_bias)


class DecidePrecision(nn.Module):
    """Which branch a call takes: one boolean `[]` for each, and the choice in bits, int64 `[B, T]`."""

    num_bits: torch.Tensor

    def __init__(self, router: nn.Module, precisions: Sequence[int]) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("num_bits", torch.tensor(list(precisions)), persistent=False)

    def forward(self, hidden: torch.Tensor, token_mask: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        choice = (self.router(hidden, token_mask) + bias).argmax(-1)
        # A row of nothing but padding asks for nothing.
        choice = choice * token_mask.any(1).squeeze(-1)
        choice = choice.max()
        chosen = [choice == index for index in range(len(self.num_bits))]
        return *chosen, self.num_bits[choice].expand(hidden.shape[0], hidden.shape[1]).clone()


def choose_precision(
    gm: fx.GraphModule, branches: Mapping[int, Mapping[int, fx.GraphModule]], routers: Mapping[int, nn.Module]
) -> fx.GraphModule:
    """Return the outlined form with branched blocks at the layers that are keys of `branches`.

    `branches[i]` are versions of block i by their bits, the lowest first, in the order of the router's logits.

    Keeps equal: in every call, the graph with the chosen branches in the place of the blocks.
    """
    graph, outputs = copy_graph(gm)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    num_precisions = len(next(iter(branches.values())))
    device = next(gm.parameters()).device
    modules["precision_bias"] = torch.zeros(len(branches), num_precisions, device=device)
    modules["precision_inputs"] = PrecisionInputs()
    input_ids, attention_mask, *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        bias = graph.get_attr("precision_bias")
    with graph.inserting_after(bias):
        shared = graph.call_module("precision_inputs", (input_ids, attention_mask, bias))
    with graph.inserting_after(shared):
        token_mask = graph.call_function(operator.getitem, (shared, 0))
    choices: list[fx.Node] = []
    for index, call in enumerate(block_calls(graph)):
        if index not in branches:
            continue
        values = results(call)
        with graph.inserting_before(call):
            row = graph.call_function(operator.getitem, (shared, 1 + len(choices)))
        call.args = (*call.args, token_mask, row)
        modules[str(call.target)] = _branched_block(branches[index], routers[index], len(values))
        with graph.inserting_after(values[-1]):
            choices.append(graph.call_function(operator.getitem, (call, len(values))))
    graph.output((*outputs, *choices))
    graph.lint()
    return fx.GraphModule(modules, graph)


def _branched_block(by_precision: Mapping[int, fx.GraphModule], router: nn.Module, num_outputs: int) -> fx.GraphModule:
    branches = list(by_precision.values())
    graph = fx.Graph()
    inputs = [graph.placeholder(node.name) for node in branches[0].graph.find_nodes(op="placeholder")]
    token_mask, bias = graph.placeholder("token_mask"), graph.placeholder("bias")
    decided = graph.call_module("decide", (inputs[0], token_mask, bias))
    modules: dict[str, nn.Module] = {"decide": DecidePrecision(router, list(by_precision))}
    modules |= {f"branch_{index}": branch for index, branch in enumerate(branches)}
    if len(branches) == 1:
        values = _split(graph, graph.call_module("branch_0", tuple(inputs)), num_outputs)
    else:
        is_first = graph.call_function(operator.getitem, (decided, 0))
        first, second = graph.get_attr("branch_0"), graph.get_attr("branch_1")
        values = _split(graph, graph.call_function(_cond, (is_first, first, second, tuple(inputs))), num_outputs)
    for index in range(2, len(branches)):
        is_chosen = graph.call_function(operator.getitem, (decided, index))
        modules[f"take_{index}"] = _take(branches[index], num_outputs)
        modules[f"keep_{index}"] = _keep(branches[index], num_outputs)
        take, keep = graph.get_attr(f"take_{index}"), graph.get_attr(f"keep_{index}")
        values = _split(graph, graph.call_function(_cond, (is_chosen, take, keep, (*inputs, *values))), num_outputs)
    choice = graph.call_function(operator.getitem, (decided, len(branches)))
    graph.output((*values, choice))
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return fx.GraphModule({name: module for name, module in modules.items() if name in used}, graph)


def _split(graph: fx.Graph, values: fx.Node, count: int) -> list[fx.Node]:
    return [graph.call_function(operator.getitem, (values, index)) for index in range(count)]


def _take(branch: fx.GraphModule, num_outputs: int) -> fx.GraphModule:
    """The branch, behind whose inputs stand the values that it replaces."""
    graph, outputs = copy_graph(branch)
    last = graph.find_nodes(op="placeholder")[-1]
    for index in reversed(range(num_outputs)):
        with graph.inserting_after(last):
            graph.placeholder(f"previous_{index}")
    graph.output(outputs)
    return fx.GraphModule(branch, graph)


def _keep(branch: fx.GraphModule, num_outputs: int) -> fx.GraphModule:
    graph = fx.Graph()
    for node in branch.graph.find_nodes(op="placeholder"):
        graph.placeholder(node.name)
    previous = [graph.placeholder(f"previous_{index}") for index in range(num_outputs)]
    # A branch of a cond must not return its input itself.
    graph.output(tuple(graph.call_function(torch.clone, (value,)) for value in previous))
    return fx.GraphModule({}, graph)
