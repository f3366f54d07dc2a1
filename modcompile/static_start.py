"""Let routers of precisions start from the best choice that is the same for all inputs."""

from datasets import Dataset

from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_sensitivity import measure_block_sensitivity
from modcompile.static_allocation import Allocation, allocation_at, greedy_allocations


def start_at_static(model: LayerwiseQuantizeForCausalLM, blocks: Dataset, average_bits: float) -> Allocation:
    """Let every router prefer the bits of its block in the best static allocation of at most so many, and return it.

    Sensitivity is measured on `blocks`, sequences as `tokenize_and_pack` makes them, with all depth gates open. What a
    training then finds is what depends on the input. Where no allocation has so few bits, it is the one with the
    fewest.
    """
    allocations = greedy_allocations(measure_block_sensitivity(model, len(model.routers), blocks))
    model.fix_precision(None)
    chosen = allocation_at(allocations, average_bits) or allocations[-1]
    for router, bits in zip(model.routers.values(), chosen, strict=True):
        router.prefer(model.precisions.index(bits))
    return chosen
