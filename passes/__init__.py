"""Rewrites from GraphModule to GraphModule, one a file.

In the order in which they are applied:

1. `drop_guards`: the trace without what pins its shapes, types and devices.
2. `outline_blocks`: flat graph → prologue, one call per decoder block, epilogue.
3. `repeat_blocks`: a few traced blocks → all blocks of the model.
4. `group_blocks`: consecutive blocks that are to share a gate → one block.
5. `insert_depth_gates`: every chosen block → router, gate, block, mix.
6. `harden_gates`: gate in [0, 1] → boolean routing mask at a threshold.
7. `lower_gates`: boolean routing mask → `torch.cond`.
8. `add_unmasked_branch`: a block, or none of it → a third branch without masks, for calls in which all tokens are open.
9. `join_decisions`: gates that read one hidden state → one decision.
10. `fuse_operators`: norms, rotary embeddings, attention and the cache in many operators → in one each.
11. `compact_tokens`: what a block does to each token by itself, for the open tokens only.
12. `fuse_for_onnxruntime`: what ONNX Runtime alone has operators for: attention over a cache, packed products, …

For an export that decides gates once and for all, between 6 and 7:

- `fold_gates`: a gate → nothing; its blocks are as they were, or what is left of them when they are skipped.

For blocks of several precisions, in the place of 4 to 7:

- `replace_weights`, `use_precision`, `round_activations`: a block on dequantized weights, on the codes themselves, or
  with inputs rounded as ONNX Runtime rounds them.
- `insert_precision_branches`: every block → router, a branch for each precision, mix (or one branch, drawn).
- `choose_precision`: every block → router, a chain of `torch.cond` between the branches, one of which may be to skip.

For integer weights, between 6 and 7:

- `quantize_weights`: products with weights, and token embeddings, on codes.

After each of them the graph runs in PyTorch, in the form that `outlined_form` describes from the second on.
"""

if __name__ != "modcompile.passes":
    raise ImportError("import this package as modcompile.passes")

from modcompile.passes.choose_precision import choose_precision
from modcompile.passes.drop_guards import drop_guards
from modcompile.passes.fuse_operators import fuse_operators
from modcompile.passes.group_blocks import group_blocks
from modcompile.passes.harden_gates import harden_gates
from modcompile.passes.insert_depth_gates import insert_depth_gates
from modcompile.passes.insert_precision_branches import insert_precision_branches
from modcompile.passes.lower_gates import lower_gates
from modcompile.passes.outline_blocks import outline_blocks
from modcompile.passes.repeat_blocks import repeat_blocks

__all__ = [
    "choose_precision",
    "drop_guards",
    "fuse_operators",
    "group_blocks",
    "harden_gates",
    "insert_depth_gates",
    "insert_precision_branches",
    "lower_gates",
    "outline_blocks",
    "repeat_blocks",
]
