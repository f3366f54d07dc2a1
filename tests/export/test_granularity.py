"""Exports whose gates decide on halves of blocks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modcompile.artifacts import write_routed_folder
from modcompile.config import RouterConfig, SkipAdapterKind
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.told_counts import ToldCounts
from modcompile.granularity import Granularity
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed
from tests.tiny_routed import tiny_base


def _deciding(granularity: Granularity, adapter: SkipAdapterKind) -> RoutedForCausalLM:
    torch.manual_seed(0)
    config = RouterConfig(granularity=granularity, router_hidden_size=0, skip_adapter=adapter, adapter_rank=3)
    model = build_routed(tiny_base(), config)
    with torch.no_grad():
        for parameter in model.router_parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "onnx"])
@pytest.mark.parametrize(
    ("granularity", "adapter"),
    [("attn", "low_rank"), ("mlp", "low_rank"), ("attn+mlp", "low_rank"), ("attn+mlp", "scale"), ("block", "scale")],
)
def test_computes_and_counts_what_pytorch_does(
    granularity: Granularity,
    adapter: SkipAdapterKind,
    target: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    model = _deciding(granularity, adapter)
    write_routed_folder(model, tokenizer, tmp_path / "routed")
    config = ExportConfig(target="ort" if target == "ort" else "onnx", emit_routing=True)
    result = export_folder(tmp_path / "routed", tmp_path / "routed" / "onnx", config)
    assert result.verification.equal_routes == 1.0
    session = RoutedSession(tmp_path / "routed" / "onnx" / MODEL_FILE, providers=["CPUExecutionProvider"])
    assert session.gated_layers == model.gated_layers

    ids = np.arange(3, 40)[None]
    mask = np.ones_like(ids)
    counts = ToldCounts(session)
    logits, _, told = session.run(ids, mask, mask.cumsum(1) - 1, session.empty_cache(1))
    counts.update(told, mask)
    model.set_router_mode(0.5)
    model.reset_usage()
    expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert counts.usage is not None
    assert 0 < model.active_ratio < 1
    assert counts.usage.active_ratio == pytest.approx(model.active_ratio)


def test_folds_halves_by_their_names(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_routed_folder(_deciding("attn+mlp", "none"), tokenizer, tmp_path / "routed")
    config = ExportConfig(always_skipped="1.mlp", always_active="2", fold_gates="none", verify="none")
    exported = export_folder(tmp_path / "routed", tmp_path / "routed" / "onnx", config)
    session = RoutedSession(exported.output / MODEL_FILE, providers=["CPUExecutionProvider"])
    assert session.always_skipped == {3}
    assert session.always_active == {4, 5}
    assert session.num_thresholds == 3
