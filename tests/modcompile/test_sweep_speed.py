import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from modcompile.depth_sweep import Sweep
from modcompile.errors import ArtifactError, ConfigError, DataError
from modcompile.evaluate import main
from modcompile.export.decoder import Decoder
from modcompile.export.session import MODEL_FILE
from modcompile.export.step_binding import Array
from modcompile.perplexity import Measurement
from modcompile.sweep_plot import draw_sweep
from modcompile.sweep_speed import SweepSpeed
from modcompile.sweep_table import sweep_table


@pytest.fixture
def exported(onnx_folder: Path, tmp_path: Path) -> Path:
    """A routed folder with an artifact of both of its gates, that a test may change."""
    return Path(shutil.copytree(onnx_folder.parent, tmp_path / "exported"))


def test_measures_each_point_of_each_way(exported: Path) -> None:
    speed = SweepSpeed(exported, 2, [range(5, 25)])
    found = speed.measure({"dense": [[0.0, 0.0]], "router": [[0.5, 0.5], [2.0, 2.0]], "none": []})
    assert {way: len(speeds) for way, speeds in found.items()} == {"dense": 1, "router": 2, "none": 0}
    assert all(0 < each < math.inf for speeds in found.values() for each in speeds)


def test_decodes_the_texts_at_the_thresholds_of_each_point(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a text is the prompt, 32 tokens of a long one; too short a text is left out."""
    texts, seen = [list(range(5, 17)), [7] * 6, list(range(3, 100))], []

    def step(decoder: Decoder, input_ids: Array, *args: Any) -> Any:
        seen.append((list(decoder._session.thresholds or ()), input_ids[0].tolist()))
        return taken(decoder, input_ids, *args)

    taken = Decoder.step
    monkeypatch.setattr(Decoder, "step", step)
    SweepSpeed(exported, 2, texts).measure({"router": [[0.5, 0.0], [2.0, 2.0]]})
    short = [texts[0][:6], *([token] for token in texts[0][6:])]
    long = [texts[2][:32], *([token] for token in texts[2][32:64])]
    one_round = [(point, ids) for point in ([0.5, 0.0], [2.0, 2.0]) for ids in (*short, *long)]
    assert seen == one_round * 3


def test_needs_a_text_to_decode(exported: Path) -> None:
    with pytest.raises(DataError, match=r"^--sweep_speed decodes a text, and none has more than 6 tokens; give more$"):
        SweepSpeed(exported, 2, [[5, 6, 7, 8, 9, 10]])


def test_needs_an_artifact(routed_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=f"has no onnx folder for --sweep_speed; run .*{routed_folder.name}$"):
        SweepSpeed(routed_folder, 2, [range(9)])


def test_needs_all_gates(exported: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 2 of 3 gates, the others are folded; for --sweep_speed export with"):
        SweepSpeed(exported, 3, [range(9)])


def test_a_sweep_tells_speeds(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sweep_active_ratios", "0.5", "--sweep_samples", "2", "--static_candidates", "1", "--max_samples", "3"]
    main([str(exported), "--sweep", "--sweep_speed", *flags, "--sequence_length", "64"])
    written = json.loads((exported / "report.json").read_text())["evaluation"]
    speeds = written["tokens_per_second"]
    assert {way: len(each) for way, each in speeds.items()} == {"dense": 1, "router": 1, "static": 1}
    lines = capsys.readouterr().out.splitlines()[-6:-1]
    assert lines[0].split()[-1] == "tokens/s"
    told = {line.split()[0]: line.split()[-1] for line in lines[1:]}
    assert told == {**{way: f"{each[0]:.1f}" for way, each in speeds.items()}, "random": "x"}
    assert imread(exported / "sweep.png").shape[1] == 12 * 120


def test_refuses_before_it_measures(exported: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--sweep_speed is of the points of a sweep; add --sweep$"):
        main([str(exported), "--sweep_speed"])
    (exported / "onnx" / MODEL_FILE).unlink()
    with pytest.raises(ArtifactError, match="has no onnx folder"):
        main([str(exported), "--sweep", "--sweep_speed", "--sequence_length", "64"])


def _measured(perplexity: float, share: float) -> Measurement:
    return Measurement(math.log(perplexity), share, share, {0: share})


def test_draws_perplexity_over_speed_from_the_dense_model_on() -> None:
    ways = {"router": [_measured(11.0, 0.9), _measured(12.0, 0.8)], "random": [_measured(50.0, 0.9)]}
    thresholds = {"router": [[0.5], [0.6]]}
    sweep = Sweep(_measured(10.0, 1.0), ways, thresholds, {"dense": [100.0], "router": [104.0, 110.0]})
    _, axes = draw_sweep(sweep).axes
    (line,) = axes.get_lines()
    np.testing.assert_allclose(np.asarray(line.get_xydata()), np.array([[100, 1], [104, 1.1], [110, 1.2]]))
    assert [row.split()[0] for row in sweep_table(sweep).splitlines()[1:]] == ["dense", "router", "router", "random"]
