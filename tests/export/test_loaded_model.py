import shutil
from pathlib import Path

import onnx
import pytest

from modcompile.errors import ArtifactError
from modcompile.export.loaded_model import LoadedModel
from modcompile.export.session import MODEL_FILE
from tests.export.tiny_in_place import write_in_place_model


def load(model_file: Path) -> LoadedModel:
    return LoadedModel(model_file, num_threads=1, providers=["CPUExecutionProvider"])


def test_names_what_goes_in_and_out_of_an_artifact_of_ours(onnx_folder: Path) -> None:
    model = load(onnx_folder / MODEL_FILE)
    names = [f"{layer}.{kind}" for layer in range(3) for kind in ("key", "value")]
    assert list(model.pasts) == [f"past_key_values.{name}" for name in names]
    assert {tuple(shape[1::2]) for shape in model.pasts.values()} == {(2, 8)}
    assert model.presents == [f"present.{name}" for name in names]
    assert model.told == ["routing.0", "routing.2"]
    assert model.optional["routing_threshold"] == [2]
    assert (model.takes_positions, model.in_place, model.device) == (True, False, "cpu")


def test_one_that_decodes_in_place(tmp_path: Path) -> None:
    model = load(write_in_place_model(tmp_path / MODEL_FILE))
    assert model.told == ["routing.0"]
    assert model.optional == {"logits_to_keep": [1], "routing_threshold": [1]}
    assert (model.takes_positions, model.in_place) == (False, True)


@pytest.mark.parametrize("removed", ["attention_mask", "logits", "present.1.value"])
def test_an_artifact_that_lacks_a_part_is_refused(tmp_path: Path, removed: str) -> None:
    path = write_in_place_model(tmp_path / MODEL_FILE)
    model = onnx.load(path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["another" if name == removed else name for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = "another" if value.name == removed else value.name
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=f"has no {removed}: it was not made by"):
        load(path)


def test_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx does not exist; make it with python -m modcompile\.export"):
        load(tmp_path / MODEL_FILE)


@pytest.mark.parametrize("damage", ["no protobuf", "cut short", "no weights", "weights cut short"])
def test_names_the_file_that_it_cannot_load(onnx_folder: Path, tmp_path: Path, damage: str) -> None:
    model_file = onnx_folder / MODEL_FILE
    copy, weights = tmp_path / MODEL_FILE, tmp_path / f"{MODEL_FILE}.data"
    content = model_file.read_bytes()
    shutil.copy(model_file.with_name(weights.name), weights)
    copy.write_bytes(b"what?" if damage == "no protobuf" else content[:1000] if damage == "cut short" else content)
    if damage == "no weights":
        weights.unlink()
    elif damage == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"can't load .*model\.onnx: ") as caught:
        load(copy)
    assert "\n" not in str(caught.value)


def test_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    tokens, logits = value("input_ids", onnx.TensorProto.FLOAT, [1]), value("logits", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["input_ids"], ["logits"])], "g", [tokens], [logits])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / MODEL_FILE)
    with pytest.raises(ArtifactError, match=r"has no attention_mask: it was not made by"):
        load(tmp_path / MODEL_FILE)
