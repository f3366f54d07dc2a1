import sys
from pathlib import Path

from benchmarks.peers.case import Case
from benchmarks.peers.rounds import failures, measure_rounds
from benchmarks.peers.timed_worker import Workload

WORK = Workload(
    threads=1, prompt=[3, 4, 5, 6], new_tokens=2, long_prompt=[3, 4], context=[], context_new_tokens=0, repeats=1
)


def _case(name: str, folder: Path) -> Case:
    model = {"folder": str(folder), "thresholds": None, "huge_pages": False}
    return Case(name, "ours", Path(sys.executable), model)


def test_cases_that_fail_are_told(onnx_folder: Path, tmp_path: Path) -> None:
    found = failures([_case("sound", onnx_folder), _case("empty", tmp_path)], WORK)
    assert found.keys() == {"empty"}
    assert f"{tmp_path}/model.onnx does not exist" in found["empty"]


def test_every_case_is_measured_in_every_round(onnx_folder: Path) -> None:
    rounds = measure_rounds([_case("one", onnx_folder), _case("other", onnx_folder)], WORK, 2)
    assert {name: len(taken) for name, taken in rounds.items()} == {"one": 2, "other": 2}
    # Without a context, nothing is told of decoding after it.
    assert "decode" in rounds["one"][0] and "decode_context" not in rounds["one"][0]
