"""Let the tokens of every row begin in its first place, for operators that know of padding behind them only.

Before::

    hidden, … = prologue(input_ids, attention_mask, position_ids, …)
    …
    logits = epilogue(hidden)

After::

    input_ids, attention_mask, position_ids, restore = align_rows(input_ids, attention_mask, position_ids)
    hidden, … = prologue(input_ids, attention_mask, position_ids, …)
    …
    logits = epilogue(restore_rows(hidden, restore))

`align_rows` rolls the new tokens of a row to the left by as many as are padding in front, and `restore` is where each
token then stands. So a batch that is padded on the left runs, inside, as one that is padded on the right.
"""

from typing import Any

import torch
from torch import fx, nn

from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.gather_tokens import gather_tokens
from modcompile.passes.lazy_graph_module import LazyGraphModule
from modcompile.passes.outlined_form import NUM_TOKEN_INPUTS, called_modules, copy_graph, getitems, routed_calls

RESTORE = f"align_rows.{NUM_TOKEN_INPUTS}"
"""The name that `restore` has in ONNX."""


class AlignRows(nn.Module):
    """`input_ids [B, T]`, `attention_mask [B, P + T]`, `position_ids [B, T]` → these aligned, and `restore [B, T]`."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        tokens = input_ids.shape[1]
        past = attention_mask.shape[1] - tokens
        new = attention_mask[:, past:]
        padding = new.argmax(1, keepdim=True)  # the first of the largest: where a row's tokens begin
        places = torch.arange(tokens, device=input_ids.device)
        count = torch.full((), tokens, device=input_ids.device)  # `torch.onnx` takes no symbolic int for a modulus
        order, restore = (places + padding) % count, (places - padding) % count
        mask = torch.cat([attention_mask[:, :past], new.gather(1, order)], 1)
        return input_ids.gather(1, order), mask, position_ids.gather(1, order), restore


class RestoreRows(nn.Module):
    """Values of aligned tokens `[B, T, …]`, `restore [B, T]` → those of the tokens as they came."""

    def forward(self, aligned: torch.Tensor, restore: torch.Tensor) -> tuple[torch.Tensor]:
        return (gather_tokens(aligned, restore),)


def align_rows(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, in outlined form or lowered, with rows aligned inside; parameters are shared with `gm`.

    Keeps equal: logits, and gates or routing masks if there are any, of tokens that are no padding; without padding in
    front, all outputs. Keys and values are those of the aligned tokens.
    """
    graph, outputs = copy_graph(gm)
    token_inputs = graph.find_nodes(op="placeholder")[:NUM_TOKEN_INPUTS]
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        call = graph.call_module("align_rows", tuple(token_inputs))
    with graph.inserting_after(call):
        aligned = getitems(call, NUM_TOKEN_INPUTS + 1)
    *values, restore = aligned
    for node, value in zip(token_inputs, values, strict=True):
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not call)
    (epilogue,) = graph.find_nodes(op="call_module", target="epilogue")
    hidden = epilogue.args[0]
    assert isinstance(hidden, fx.Node)
    with graph.inserting_before(epilogue):
        (restored,) = getitems(graph.call_module("restore_rows", (hidden, restore)), 1)
    restored.meta = dict(hidden.meta)
    epilogue.replace_input_with(hidden, restored)
    num_routed = len(routed_calls(gm))
    kept, routing = outputs[: len(outputs) - num_routed], outputs[len(outputs) - num_routed :]
    modules: dict[str, Any] = {"align_rows": AlignRows(), "restore_rows": RestoreRows(), **called_modules(gm)}
    masks = []
    for index, mask in enumerate(routing):
        modules[f"restore_routing.{index}"] = RestoreRows()
        masks += getitems(graph.call_module(f"restore_routing.{index}", (mask, restore)), 1)
    graph.output((*kept, *masks))
    graph.lint()
    modules |= {str(node.target): get_attribute(gm, str(node.target)) for node in graph.find_nodes(op="get_attr")}
    return LazyGraphModule(modules, graph)
