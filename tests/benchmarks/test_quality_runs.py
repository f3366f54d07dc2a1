import json
import math
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.measuring import Points, measured, searched
from benchmarks.quality.recipes import RANDOM, ROUTED, SEARCHED, STATIC, Recipe
from benchmarks.quality.runs import Trained, beside, mixed_text, trainable_share, trained
from benchmarks.quality.texts import windows
from modcompile.packing import tokenize_and_pack
from tests.folder_contents import contents

FLAGS = "--sequence_length 16 --skip_adapter low_rank --adapter_rank 2"
FITTED = Recipe(ROUTED, f"{FLAGS} --router_hidden_size 0 --router_start_samples 8 --budget_loss price")
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def training(base_folder: Path, train_file: Path, folder: Path) -> Trained:
    return trained(FITTED, str(base_folder), train_file, STEPS, 0, folder)


def test_the_same_training_is_not_done_again(
    training: Trained, base_folder: Path, train_file: Path, folder: Path
) -> None:
    before = contents(training.folder)
    assert training.minutes > 0
    assert 0 < trainable_share(training.folder) < 1
    record = beside(training.folder, ".training.json")
    record.write_text(json.dumps({"command": training.command, "minutes": 7.0}))
    again = trained(FITTED, str(base_folder), train_file, STEPS, 0, folder)
    assert (again.folder, again.minutes) == (training.folder, 7.0)
    assert contents(training.folder) == before
    record.write_text(json.dumps({"command": training.command + " --of_other_flags", "minutes": 7.0}))
    assert trained(FITTED, str(base_folder), train_file, STEPS, 0, folder).minutes != 7.0


def test_a_seed_has_a_folder_of_its_own(training: Trained, base_folder: Path, train_file: Path, folder: Path) -> None:
    other = trained(FITTED, str(base_folder), train_file, STEPS, 1, folder)
    assert other.folder != training.folder
    assert contents(other.folder)["routers.safetensors"] != contents(training.folder)["routers.safetensors"]


def test_is_measured_once(training: Trained, train_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = train_file.read_text()
    texts, calibration = {"one": windows(text, tokenizer, 16, 2)}, tokenize_and_pack([text], tokenizer, 16)
    found = measured(training, FITTED, texts, calibration, [0.9, 0.6])
    assert set(found) == {ROUTED, RANDOM}
    for points in found.values():
        assert [point["target"] for point in points["one"]] == [0.9, 0.6]
        assert all(0 < point["work"] <= 1 and math.isfinite(point["perplexity"]) for point in points["one"])
    kept = beside(training.folder, ".measured.json")
    stored = json.loads(kept.read_text())
    as_they_were: Points = {ROUTED: {"one": []}}
    kept.write_text(json.dumps({**stored, "points": as_they_were}))
    assert measured(training, FITTED, texts, calibration, [0.9, 0.6]) == as_they_were
    # What was asked for other texts, targets or trainings says nothing of these.
    of_more = {"one": windows(text, tokenizer, 16, 3)}
    assert measured(training, FITTED, of_more, calibration, [0.9, 0.6]) != as_they_were
    kept.write_text(json.dumps({**stored, "points": as_they_were}))
    assert measured(training, FITTED, texts, calibration, [0.7]) != as_they_were


def test_thresholds_are_searched_once(training: Trained, train_file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = train_file.read_text()
    texts, calibration = {"one": windows(text, tokenizer, 16, 2)}, windows(text, tokenizer, 16, 4)
    (points,) = searched(training, texts, calibration, calibration, [0.9, 0.6])[SEARCHED].values()
    assert [point["target"] for point in points] == [0.9] * 3 + [0.6] * 3
    assert [point["moved"] for point in points] == [-0.3, 0.0, 0.3] * 2
    works = [point["work"] for point in points]
    assert works[0] >= works[1] >= works[2]
    assert works[0] > works[2] or works[3] > works[5]
    kept = beside(training.folder, ".searched.json")
    as_they_were: Points = {SEARCHED: {"one": []}}
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "points": as_they_were}))
    assert searched(training, texts, calibration, calibration, [0.9, 0.6]) == as_they_were
    assert searched(training, texts, calibration, calibration, [0.9]) != as_they_were


def test_thresholds_are_searched_on_all_kinds_of_text_that_were_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(33)))
    assert mixed_text(file) == "\n\n".join(f"text {number}" for number in range(0, 33, 8))


def test_static_selections_are_measured_as_they_are(
    base_folder: Path, train_file: Path, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    static = Recipe(STATIC, f"{FLAGS} --static_selection_samples 4 --target_active_ratio 0.67", 0.67)
    training = trained(static, str(base_folder), train_file, STEPS, 0, folder)
    texts = {"one": windows(train_file.read_text(), tokenizer, 16, 2)}
    (points,) = measured(training, static, texts, texts["one"], [0.9])[STATIC].values()
    assert [point["target"] for point in points] == [0.67]
    assert points[0]["work"] == pytest.approx(2 / 3)


def test_files_beside_folders_have_their_whole_names() -> None:
    """Or those of 0.95 and 0.9, and of all seeds, would be one: what follows the dot looks like a suffix."""
    assert beside(Path("all/static-0.95-seed0"), ".json") == Path("all/static-0.95-seed0.json")
