from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from modcompile.precision_evaluation import PrecisionEvaluation, PrecisionMeasurement
from modcompile.precision_plot import draw_precisions, plot_precisions
from modcompile.static_allocation import Allocation


def _evaluation(
    *, lowest_loss: float = 2.5, at_router: Allocation | None = (4, 16), trained: bool = True
) -> PrecisionEvaluation:
    """Of two blocks, the first of which is skipped for some tokens."""

    def uniform(loss: float, *bits: int) -> PrecisionMeasurement:
        return PrecisionMeasurement(loss, tuple({each: 1.0} for each in bits))

    fixed = {4: uniform(lowest_loss, 4, 4), 8: uniform(2.0, 8, 8), 16: uniform(1.9, 16, 16)}
    return PrecisionEvaluation(
        fixed,
        router=PrecisionMeasurement(2.1, ({0: 0.25, 16: 0.75}, {8: 1.0})),
        static={(4, 4): fixed[4], (4, 16): uniform(2.2, 4, 16), (16, 16): fixed[16]},
        at_router=at_router,
        sensitivity=[{16: 0.0, 8: 0.1, 4: 0.2}] * 2,
        trained=trained,
        sequences=2,
        predicted_tokens=20,
    )


def test_draws_every_measurement() -> None:
    evaluation = _evaluation()
    quality, _ = draw_precisions(evaluation).axes
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in quality.get_lines()}
    assert drawn == {
        "best static allocation": [[m.average_bits, m.perplexity] for m in evaluation.static.values()],
        "fixed precision": [[m.average_bits, m.perplexity] for m in evaluation.fixed.values()],
        "router": [[(0.75 * 16 + 8) / 2, evaluation.router.perplexity]],
    }


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"trained": False}, "router\nchoice of bits untrained"),
        ({"at_router": None}, "router\nfewer bits than any static allocation"),
        (
            {"trained": False, "at_router": None},
            "router\nchoice of bits untrained\nfewer bits than any static allocation",
        ),
    ],
)
def test_legend_tells_what_can_not_be_compared(options: dict[str, Any], label: str) -> None:
    quality, _ = draw_precisions(_evaluation(**options)).axes
    legend = quality.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["best static allocation", "fixed precision", label]


def test_draws_the_choices_of_the_router() -> None:
    _, choices = draw_precisions(_evaluation()).axes
    assert [container.get_label() for container in choices.containers] == ["skipped", "8 bits", "16 bits"]


@pytest.mark.parametrize(("lowest_loss", "scale"), [(2.9, "linear"), (3.1, "log"), (1e4, "linear")])
def test_scale_is_logarithmic_where_the_span_demands(lowest_loss: float, scale: str, tmp_path: Path) -> None:
    """An infinite perplexity spans nothing, and is left out."""
    evaluation = _evaluation(lowest_loss=lowest_loss)
    quality, _ = draw_precisions(evaluation).axes
    assert quality.get_yscale() == scale
    (fixed,) = [line for line in quality.get_lines() if line.get_label() == "fixed precision"]
    assert len(np.asarray(fixed.get_xydata())) == (2 if lowest_loss == 1e4 else 3)
    plot_precisions(evaluation, tmp_path / "plot.png")


def test_writes_a_png(tmp_path: Path) -> None:
    plot_precisions(_evaluation(), tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").shape == (480, 1320, 4)
