import shutil
from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig

from modcompile.artifacts import load_with_routers
from modcompile.config import RouterConfig
from modcompile.errors import ArtifactError, ConfigError, UnsupportedModelError
from modcompile.export.depth_subject import DepthSubject
from modcompile.export.export_config import ExportConfig
from modcompile.export.exportable import load_exportable, of_gates
from modcompile.export.precision_subject import PrecisionSubject
from modcompile.export.verification_inputs import NUM_TEXTS
from modcompile.passes.code_key import code_key
from tests.tiny_any_precision import tiny_any_precision, write_any_precision
from tests.tiny_quantized import BITS, save_deciding_routers

TEXTS = [[(row * 37 + index * 11) % 300 for index in range(100)] for row in range(NUM_TEXTS)]


def texts(config: PretrainedConfig) -> list[list[int]]:
    assert config.model_type == "llama"
    return TEXTS


def test_a_routed_folder_is_gated_at_the_threshold(routed_folder: Path) -> None:
    loaded = load_exportable(routed_folder, ExportConfig(hard_threshold=0.3), texts)
    assert dict(loaded.graph().named_buffers())["routing_threshold"].tolist() == pytest.approx([0.3, 0.3])
    assert loaded.proof is not None
    subject, cases = loaded.proof.subject, loaded.proof.cases
    assert isinstance(subject, DepthSubject)
    assert cases[0].thresholds == pytest.approx((0.3, 0.3))
    assert subject.branches == {0: ("skipped", "executed"), 2: ("skipped", "executed")}


def test_a_model_at_hand_is_exported_as_one_that_was_read(routed_folder: Path) -> None:
    config = ExportConfig(hard_threshold=0.3)
    read = load_exportable(routed_folder, config, texts)
    at_hand = of_gates(load_with_routers(routed_folder, config.hard_threshold), config, texts)
    graph, expected = at_hand.graph(), read.graph()
    assert code_key(graph) == code_key(expected)
    assert graph.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(graph.state_dict()[name], tensor)
    assert at_hand.max_positions == read.max_positions
    assert at_hand.proof is not None and read.proof is not None
    assert at_hand.proof.cases == read.proof.cases


@pytest.mark.parametrize("depth", [None, RouterConfig(router_hidden_size=8, router_pattern="every_other")])
def test_a_quantized_folder_chooses_by_the_routers_in_it(
    quantized_folder: Path, tmp_path: Path, depth: RouterConfig | None
) -> None:
    folder = Path(shutil.copytree(quantized_folder, tmp_path / "own"))
    save_deciding_routers(folder, depth)
    loaded = load_exportable(folder, ExportConfig(hard_threshold=0.3), texts)
    graph = loaded.graph()
    buffers = dict(graph.named_buffers())
    assert torch.equal(buffers["precision_bias"], torch.zeros(3, len(BITS)))
    names = [f"at {bits} bits" for bits in BITS]
    assert loaded.proof is not None
    subject, cases = loaded.proof.subject, loaded.proof.cases
    assert isinstance(subject, PrecisionSubject)
    if depth is None:
        assert "routing_threshold" not in buffers
        assert cases[0].thresholds == ()
        assert subject.branches == dict.fromkeys(range(3), names)
    else:
        assert buffers["routing_threshold"].tolist() == pytest.approx([0.3, 0.3])
        assert cases[0].thresholds == (0.3, 0.3)
        assert subject.branches == {0: ["skipped", *names], 1: names, 2: ["skipped", *names]}
    assert [value.tolist() for value in subject.stored(cases[0]).values()] == [
        buffers[name].tolist() for name in subject.stored(cases[0])
    ]


def test_look_up_tables_are_not_lowered(tmp_path: Path) -> None:
    write_any_precision(tiny_any_precision(), tmp_path / "tables")
    loaded = load_exportable(tmp_path / "tables", ExportConfig(), texts)
    with pytest.raises(UnsupportedModelError, match="is looked up in tables"):
        loaded.graph()


def test_a_folder_of_neither_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no router_config\.json"):
        load_exportable(tmp_path, ExportConfig(), texts)


def test_refuses_to_round_for_a_text_what_is_quantized(quantized_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--rounding gptq is for routed folders, .* give --weights int8"):
        load_exportable(quantized_folder, ExportConfig(weights="int4", rounding="gptq"), texts)
