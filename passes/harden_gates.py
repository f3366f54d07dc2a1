"""Turn soft gates into boolean decisions at a threshold.

Before, in a routed block::

    router_logits = router(hidden)
    gate = gate(router_logits)
    y, key, value = block(hidden, …)
    hidden = gate * y + (1 - gate) * hidden

After, with a threshold for each routed layer as the buffer `routing_threshold [R]` of the graph::

    open, routing_mask = decide(hidden, token_mask, threshold_logit)
    y, key, value = block(hidden, …)
    hidden = where(open, y, hidden)

    decide:  open = router(hidden) > threshold_logit;  routing_mask = open & token_mask

`sigmoid(router_logits) > threshold` is decided on logits: `threshold_logit` is `log(t / (1 - t))` of the threshold
clamped to [0, 1], worked out once for all layers. So a threshold of 0 is -inf and executes every token even where the
sigmoid would round to 0, one of 1 or more is +inf and skips every token, and no sigmoid is left in a layer.
`token_mask` is false where the attention mask says padding. Padding never counts as asking for work; its own hidden
state, which no token ever attends to, still follows its gate, so that a threshold of 0 is the dense model everywhere.
"""

import operator

import torch
from torch import fx, nn

from modcompile.passes.eliminate_dead_code import eliminate_dead_code
from modcompile.passes.outlined_form import called_modules, copy_graph, results, routed_calls


class RoutingInputs(nn.Module):
    """What all layers' decisions share: the mask of tokens `[B, T, 1]`, and one logit a routed layer, `[1]` each."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, routing_threshold: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        threshold = routing_threshold.clamp(0, 1)
        threshold_logits = torch.log(threshold / (1 - threshold))
        tokens = attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :].unsqueeze(-1)
        return tokens != 0, *torch.split(threshold_logits, 1)


def harden_gates(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the routed graph with boolean routing masks `[B, T, 1]` as its last outputs, in place of the gates.

    A routing mask is true for the tokens (padding excluded) that the layer is executed for. The buffer
    `routing_threshold` starts at 0.5 for every routed layer. Blocks and routers are shared with `gm`.

    Keeps equal: keys and values of every layer; the hidden state wherever a gate is exactly 0 or 1.
    """
    graph, outputs = copy_graph(gm)
    calls = routed_calls(gm, graph)
    modules: dict[str, nn.Module | torch.Tensor] = dict(called_modules(gm))
    modules["routing_inputs"] = RoutingInputs()
    modules["routing_threshold"] = torch.full((len(calls),), 0.5, device=next(gm.parameters()).device)

    input_ids, attention_mask, *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        threshold = graph.get_attr("routing_threshold")
    with graph.inserting_after(threshold):
        shared = graph.call_module("routing_inputs", (input_ids, attention_mask, threshold))
    with graph.inserting_after(shared):
        token_mask = graph.call_function(operator.getitem, (shared, 0))
    for position, call in enumerate(calls):
        with graph.inserting_before(call):
            threshold_logit = graph.call_function(operator.getitem, (shared, 1 + position))
        call.args += (token_mask, threshold_logit)
        block = gm.get_submodule(str(call.target))
        assert isinstance(block, fx.GraphModule)
        modules[str(call.target)] = _harden_block(block)
    graph.output(outputs)
    graph.lint()
    return fx.GraphModule(modules, graph)


def _harden_block(soft: fx.GraphModule) -> fx.GraphModule:
    graph, (_, *cache, _) = copy_graph(soft)
    (block,) = graph.find_nodes(op="call_module", target="block")
    inputs = graph.find_nodes(op="placeholder")
    hidden = inputs[0]
    with graph.inserting_after(inputs[-1]):
        token_mask = graph.placeholder("token_mask")
    with graph.inserting_after(token_mask):
        threshold_logit = graph.placeholder("threshold_logit")
    decision = graph.call_module("decide", (hidden, token_mask, threshold_logit))
    is_open, routing_mask = [graph.call_function(operator.getitem, (decision, index)) for index in range(2)]
    chosen = graph.call_function(torch.where, (is_open, results(block)[0], hidden))
    graph.output((chosen, *cache, routing_mask))
    eliminate_dead_code(graph)
    children = {"decide": _decide(soft.get_submodule("router")), "block": soft.get_submodule("block")}
    return fx.GraphModule(children, graph)


def _decide(router: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    hidden, token_mask, threshold_logit = map(graph.placeholder, ("hidden", "token_mask", "threshold_logit"))
    is_open = graph.call_function(operator.gt, (graph.call_module("router", (hidden,)), threshold_logit))
    graph.output((is_open, graph.call_function(operator.and_, (is_open, token_mask))))
    return fx.GraphModule({"router": router}, graph)
