"""Which tokens used which layers, as a picture in which the text can be read along."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from modcompile.granularity import label_of
from modcompile.modeling import RoutedForCausalLM
from modcompile.png_files import write_png
from modcompile.restored_routing import restored_routing
from modcompile.tracing import eval_mode

TOKENS_PER_ROW = 48
_VISIBLE = {"\n": "⏎", "\t": "⇥", " ": "␣"}


@dataclass(frozen=True)
class Routes:
    """What a hard model executed for the tokens of a text."""

    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    """Their names, of the routed ones."""
    executed: NDArray[np.bool_]
    """`[R, T]`: whether each routed layer was executed for each token."""


@torch.no_grad()
def find_routes(
    model: RoutedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Sequence[int],
    hard_threshold: float | Sequence[float],
) -> Routes:
    """Run one text; the router mode of the model and its usage stay as they were.

    Raises:
        ConfigError: a threshold is negative, infinite or not a number.
    """
    with restored_routing(model), eval_mode(model):
        model.set_router_mode(hard_threshold)
        output = model(torch.tensor([list(input_ids)], device=model.device), use_cache=False)
    masks = [gate[0, :, 0].cpu().numpy().astype(bool) for gate in output.gates or ()]
    tokens = tuple(str(tokenizer.decode([token])) for token in input_ids)
    layers = tuple(label_of(layer, model.router_config.granularity) for layer in model.routed_layers)
    return Routes(tokens, layers, np.stack(masks))


def plot_routes(routes: Routes, path: Path) -> None:
    """Write a PNG.

    Raises:
        OutputError: it can't be written; what was there before still is.
    """
    with warnings.catch_warnings():
        # A script that the font does not have is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        write_png(draw_routes(routes), path)


def draw_routes(routes: Routes) -> Figure:
    """One panel for every `TOKENS_PER_ROW` tokens, layers from the bottom up, each token under its column."""
    count = len(routes.tokens)
    rows = -(-count // TOKENS_PER_ROW)
    height = 0.12 * len(routes.layers) + 1.4
    figure = Figure(figsize=(13, height * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for number, axes in enumerate(panels):
        part = slice(number * TOKENS_PER_ROW, (number + 1) * TOKENS_PER_ROW)
        tokens, executed = routes.tokens[part], routes.executed[:, part]
        axes.imshow(executed, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        labels = [_visible(token) for token in tokens]
        axes.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8, fontfamily="monospace", parse_math=False)
        axes.set_yticks(range(len(routes.layers)), routes.layers, fontsize=6.5)
        axes.set_xlim(-0.5, TOKENS_PER_ROW - 0.5)
        axes.set_ylabel("layer")
    panels[0].set_title(f"executed (dark) for {count} tokens: {routes.executed.mean():.3f} of all")
    return figure


def _visible(token: str) -> str:
    """A token without the space that most begin with, and with signs for what can't be seen."""
    shown = token[1:] if len(token) > 1 and token[0] == " " else token
    return "".join(_VISIBLE.get(character, character) for character in shown)
