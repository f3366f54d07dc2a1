import torch
from torch import fx

from modcompile.precision_branches import PrecisionWeights
from modcompile.precision_config import QuantizationConfig
from modcompile.quantizing import quantize_base
from tests.tiny_graphs import outlined_graph, shared_model


def test_each_block_has_a_version_for_every_precision(architecture: str) -> None:
    dense = outlined_graph(architecture)
    checkpoint = quantize_base(shared_model(architecture), QuantizationConfig(group_size=32, method="rtn"))
    branches = PrecisionWeights(checkpoint).branches(dense)
    assert list(branches) == [0, 1, 2]
    for layer, versions in branches.items():
        assert list(versions) == [4, 8, 16]
        assert versions[16] is dense.get_submodule(f"blocks.{layer}")
        # All weights of linear layers are replaced, and nothing else is.
        assert all(tensor.dim() < 2 for tensor in versions[4].parameters())
        assert all(tensor.dim() == 2 for tensor in versions[4].buffers())


def test_graphs_of_one_checkpoint_share_the_weights() -> None:
    checkpoint = quantize_base(shared_model("llama"), QuantizationConfig(group_size=32, method="rtn"))
    weights = PrecisionWeights(checkpoint)
    tensors = []
    for use_cache in (True, False):
        version = weights.branches(outlined_graph("llama", use_cache=use_cache))[0][4]
        assert isinstance(version, fx.GraphModule)
        tensors.append(version.get_buffer("mlp.up_proj.weight_4"))
    assert tensors[0] is tensors[1]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors[0], checkpoint.weights[name].dequantize(4))
