import torch
from torch import fx

from modcompile.passes.group_blocks import group_blocks
from modcompile.passes.map_blocks import map_blocks
from modcompile.passes.masked_block import masked_block
from modcompile.passes.outlined_form import inner_block, is_group
from modcompile.passes.skip_block import skip_block
from tests.passes.toy_block import HIDDEN, PAST_KEY, toy_block
from tests.tiny_graphs import outlined_graph


def group_of(layers: range) -> fx.GraphModule:
    group = group_blocks(outlined_graph("llama"), [layers]).get_submodule(f"blocks.{layers[0]}-{layers[-1]}")
    assert isinstance(group, fx.GraphModule)
    return group


@torch.no_grad()
def test_rewrites_a_block_itself() -> None:
    skipped = map_blocks(toy_block(), skip_block, "ignored: the rewrite says what is taken")
    assert not is_group(skipped)
    assert torch.equal(skipped(HIDDEN, PAST_KEY)[0], HIDDEN)


def test_rewrites_every_member_of_a_group_and_hands_the_new_input_to_all() -> None:
    group = group_of(range(3))
    masked = map_blocks(group, masked_block, "is_open")
    assert is_group(masked)
    *taken, is_open = masked.graph.find_nodes(op="placeholder")
    assert [node.name for node in taken] == [node.name for node in group.graph.find_nodes(op="placeholder")]
    assert is_open.name == "is_open"
    calls = masked.graph.find_nodes(op="call_module")
    assert [call.args[-1] for call in calls] == [is_open] * 3
    for name, member in group.named_children():
        own = masked.get_submodule(name)
        assert isinstance(own, fx.GraphModule)
        assert inner_block(own) is member


def test_without_a_new_input_takes_what_the_group_did() -> None:
    group = group_of(range(1, 3))
    skipped = map_blocks(group, skip_block)
    assert [str(node) for node in skipped.graph.nodes] == [str(node) for node in group.graph.nodes]
    assert not [name for name, _ in skipped.named_parameters() if "mlp" in name]
