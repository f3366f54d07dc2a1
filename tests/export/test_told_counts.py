from pathlib import Path

import numpy as np
import pytest

from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.told_counts import ToldCounts


def test_counts_the_active_ratio_of_what_is_a_token(onnx_folder: Path) -> None:
    counts = ToldCounts(RoutedSession(onnx_folder / MODEL_FILE))
    assert counts.bits is None
    yes, no = np.array([[True, True]]), np.array([[False, True]])
    counts.update({"routing.0": yes, "routing.2": no}, np.array([[1, 0]]))
    assert counts.describe() == "active ratio 0.500"
    counts.update({"routing.0": yes, "routing.2": no}, np.array([[1, 1]]))
    assert counts.usage is not None
    assert counts.usage.active_ratio_per_layer == {0: 1.0, 2: pytest.approx(1 / 3)}
    assert counts.describe() == "active ratio 0.667"


def test_counts_bits_of_the_prompt_and_of_new_tokens(precision_onnx_folder: Path) -> None:
    counts = ToldCounts(RoutedSession(precision_onnx_folder / MODEL_FILE))
    assert counts.usage is None
    prompt = {f"precision.{layer}": np.array([[2, 16, 4]]) for layer in range(3)}
    counts.update(prompt, np.array([[0, 1, 1]]))
    assert counts.describe() == "average bits 10.00 in the prompt"
    counts.update({name: np.array([[4]]) for name in prompt}, np.array([[1]]))
    assert counts.describe() == "average bits 10.00 in the prompt, 4.00 in new tokens"


def test_says_how_to_have_it_told(silent_onnx_folder: Path) -> None:
    counts = ToldCounts(RoutedSession(silent_onnx_folder / MODEL_FILE))
    counts.update({}, np.array([[1]]))
    assert (counts.usage, counts.bits) == (None, None)
    assert counts.describe() == "active ratio not told by this artifact (export it with --emit_routing)"
