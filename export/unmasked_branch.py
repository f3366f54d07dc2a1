"""Whether routed blocks get a branch without masks (`add_unmasked_branch`), which costs memory."""

from typing import Literal

from torch import fx

from modcompile.passes.nested_graphs import all_graphs
from modcompile.passes.outlined_form import lowered_calls
from modcompile.passes.skip_path import skip_of

UnmaskedBranch = Literal["auto", "always", "never"]

MAX_BYTES = 128 * 2**20
"""What `auto` may spend: as many bytes as the routed blocks' weights have.

What the branch saves is a time for each block and step, whatever the size of the model.
"""


def wants_unmasked_branch(choice: UnmaskedBranch, gm: fx.GraphModule, *, integers: bool) -> bool:
    """For the graph of `lower_gates`, whose weights are `integers` or not.

    `auto` is for blocks with adapters, which the branch leaves out; elsewhere all that it saves is masks: of a decode
    step of SmolLM2-135M in 4 bits 1.6 %, instead of 4.8 % (`benchmarks.routing_overhead`), for a session of 255 MiB
    instead of 182. And it leaves floats as they are: ONNX Runtime prepares weights for the branch without masks only
    (`InnerWeights`), and a product of unprepared floats takes longer where a batch needs a block for some of its tokens
    (576 × 1536 on one thread 0.37 ms instead of 0.22 with 8 rows, 12.2 instead of 11.6 with 512).
    """
    if choice == "auto":
        return integers and _has_adapters(gm) and routed_bytes(gm) <= MAX_BYTES
    return choice == "always"


def routed_bytes(gm: fx.GraphModule) -> int:
    """Of the weights of the blocks that a lowered graph executes or skips."""
    branches = [gm.get_submodule(f"{call.target}.then_branch") for call in lowered_calls(gm)]
    held = {id(tensor): tensor for each in branches for tensor in (*each.parameters(), *each.buffers())}
    return sum(tensor.nbytes for tensor in held.values())


def _has_adapters(gm: fx.GraphModule) -> bool:
    branches = [gm.get_submodule(f"{call.target}.then_branch") for call in lowered_calls(gm)]
    return any(skip_of(each) is not None for branch in branches for each in all_graphs(branch))
