import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers.case import Case
from benchmarks.peers.timed_worker import Workload
from modcompile import load_with_routers
from tests.tiny_models import VOCAB_SIZE

IDS = [int(token) for token in torch.randint(3, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(0))]
WORK = Workload(
    threads=1, prompt=IDS[:4], new_tokens=2, long_prompt=IDS[:8], context=IDS, context_new_tokens=2, repeats=1
)


def test_worker_measures_in_a_process_of_its_own(onnx_folder: Path) -> None:
    case = Case(
        "ours", "ours", Path(sys.executable), {"folder": str(onnx_folder), "thresholds": None, "huge_pages": False}
    )
    found = case.measure(WORK)
    assert found.keys() == {
        "prefill",
        "prefill_long",
        "decode",
        "decode_context",
        "resident_mib",
        "resident_context_mib",
        "resident_before_mib",
    }
    assert all(value > 0 for value in found.values())
    assert found["resident_mib"] > found["resident_before_mib"]


def test_losses_are_those_of_pytorch(onnx_folder: Path, routed_folder: Path) -> None:
    case = Case(
        "ours", "ours", Path(sys.executable), {"folder": str(onnx_folder), "thresholds": None, "huge_pages": False}
    )
    model = load_with_routers(routed_folder, hard_threshold=0.5)
    expected = []
    for window in (IDS, IDS[:5]):
        logits = model(torch.tensor([window]), use_cache=False).logits[0]
        expected.append(float(cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="sum")))
    assert case.losses([IDS, IDS[:5]], 1) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_dense_and_soft_pytorch_are_workers(base_folder: Path) -> None:
    for soft_gates in (False, True):
        model = {"folder": str(base_folder), "soft_gates": soft_gates}
        assert Case("", "pytorch", Path(sys.executable), model).measure(WORK)["decode"] > 0


def test_worker_that_fails_says_why(tmp_path: Path) -> None:
    case = Case("", "ours", Path(sys.executable), {"folder": str(tmp_path), "thresholds": None, "huge_pages": False})
    with pytest.raises(
        RuntimeError, match=r"^\S+ -m benchmarks\.peers\.ours ended with 1: .*model\.onnx does not exist"
    ):
        case.measure(WORK)
