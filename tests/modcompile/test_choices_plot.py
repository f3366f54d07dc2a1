from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from modcompile.choices_plot import draw_choices


def test_stacks_the_choices_of_every_block() -> None:
    axes = Figure().subplots()
    draw_choices(axes, [{0: 0.25, 16: 0.75}, {8: 1.0}])
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    stacked = {
        str(container.get_label()): [(bar.get_y(), bar.get_height()) for bar in container.patches] for container in bars
    }
    assert stacked == {
        "skipped": [(0.0, 0.25), (0.0, 0.0)],
        "8 bits": [(0.25, 0.0), (0.0, 1.0)],
        "16 bits": [(0.25, 0.75), (1.0, 0.0)],
    }
    assert len({bar.patches[0].get_facecolor() for bar in bars}) == 3
