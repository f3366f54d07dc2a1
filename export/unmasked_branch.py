"""Whether routed blocks get a branch without masks (`add_unmasked_branch`), which costs memory."""

from typing import Literal

from torch import fx

from modcompile.passes.outlined_form import lowered_calls

UnmaskedBranch = Literal["auto", "always", "never"]

MAX_BYTES = 128 * 2**20
"""What `auto` may spend: as many bytes as the routed blocks' weights have.

What the branch saves is a time for each block and step, whatever the size of the model.
"""


def wants_unmasked_branch(choice: UnmaskedBranch, gm: fx.GraphModule, *, integers: bool) -> bool:
    """For the graph of `lower_gates`, whose weights are `integers` or not.

    `auto` leaves floats as they are. ONNX Runtime prepares weights for the branch without masks only (`InnerWeights`),
    and a product of unprepared floats takes longer where a batch needs a block for some of its tokens: 576 × 1536 on
    one thread 0.37 ms instead of 0.22 with 8 rows, 12.2 instead of 11.6 with 512.
    """
    return choice == "always" or (choice == "auto" and integers and routed_bytes(gm) <= MAX_BYTES)


def routed_bytes(gm: fx.GraphModule) -> int:
    """Of the weights of the blocks that a lowered graph executes or skips."""
    branches = [gm.get_submodule(f"{call.target}.then_branch") for call in lowered_calls(gm)]
    held = {id(tensor): tensor for each in branches for tensor in (*each.parameters(), *each.buffers())}
    return sum(tensor.nbytes for tensor in held.values())
