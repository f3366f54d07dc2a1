from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks.peers.plot import plot
from benchmarks.peers.report import report

NO_CONTEXT = {"prefill": 100.0, "prefill_long": 200.0, "decode": 10.0, "resident_mib": 50.0, "resident_before_mib": 9.0}


@pytest.fixture
def result() -> dict[str, Any]:
    """Of two rounds; only one case decodes after a context."""
    ours = NO_CONTEXT | {"decode": 25.0, "decode_context": 5.0}
    return {
        "rounds": {"ours: fast": [ours, ours | {"decode": 35.0}], "a peer": [NO_CONTEXT, NO_CONTEXT]},
        "tokens": {"prompt": 64, "long_prompt": 512, "context": 4096},
        "baselines": ["ours: dense", "ours: dense, larger groups"],
        "peers": ["a peer"],
        "perplexity": {"ours: fast": 17.254},
        "models": {"ours: fast": {"seconds": 61.4, "verifying_seconds": 30.0, "megabytes": 120.0}},
        "notes": ["A note."],
    }


def _rows(text: str, name: str) -> list[list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row[1:] for row in cells if row[0] == name]


def test_report_tells_speeds_ratios_perplexity_and_notes(result: dict[str, Any]) -> None:
    text = report(result)
    speeds, against, *rest = _rows(text, "ours: fast")
    assert speeds == [
        "100 (100 to 100)",
        "200 (200 to 200)",
        "30.0 (27.5 to 32.5)",
        "5.0 (5.0 to 5.0)",
        "50.0 (50.0 to 50.0)",
        "9.0 (9.0 to 9.0)",
    ]
    assert against == ["3.00 x (2.75 to 3.25)"]
    assert rest == [*[["1.00 x (1.00 to 1.00)"]] * 3, ["17.25"], ["61", "30", "120"]]
    # What the peer does not do has an empty cell; it is not compared with itself, nor anyone with it there.
    assert [row[3] for row in _rows(text, "a peer")] == [""]
    assert text.endswith("\n- A note.\n")


def test_report_compares_with_our_dense_exports_first(result: dict[str, Any]) -> None:
    result["rounds"]["ours: dense"] = [NO_CONTEXT | {"decode": 20.0}] * 2
    decode = report(result).split("Decode after 64")[1]
    assert "| case | against ours: dense | against a peer |" in decode
    result["rounds"]["ours: dense, larger groups"] = result["rounds"]["ours: fast"]
    assert "| case | against ours: dense | against ours: dense, larger groups | against a peer |" in report(result)
    assert _rows(decode, "ours: fast")[0] == ["1.50 x (1.38 to 1.62)", "3.00 x (2.75 to 3.25)"]
    assert _rows(decode, "ours: dense")[0] == ["1.00 x (1.00 to 1.00)", "2.00 x (2.00 to 2.00)"]


def test_report_without_a_context_has_no_column_for_it(result: dict[str, Any]) -> None:
    result["tokens"]["context"] = 0
    result["rounds"]["ours: fast"] = [NO_CONTEXT] * 2
    text = report(result)
    assert "decode after 0" not in text and "Decode after 0" not in text
    assert [len(row) for row in _rows(text, "a peer")] == [5]


def test_report_of_random_weights_has_no_perplexity(result: dict[str, Any]) -> None:
    assert "perplexity" not in report(result | {"perplexity": {}})


def test_report_of_peers_alone_has_no_ratios(result: dict[str, Any]) -> None:
    text = report(result | {"rounds": {"a peer": [NO_CONTEXT]}})
    assert _rows(text, "a peer") and "as a multiple" not in text


def test_plot_is_a_picture(result: dict[str, Any], tmp_path: Path) -> None:
    plot(result, tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[2] == 4
