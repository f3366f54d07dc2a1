"""Exported folders in optimum, which needs older packages than we do, and so an environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from tests.dense_folders import DENSE_ARCHITECTURES

ROOT = Path(__file__).parents[1]
OVERLAY = ROOT / ".optimum"
NUM_NEW = 12
FOLDERS = ("routed", *DENSE_ARCHITECTURES)
PROMPTS = [[7, 8], [5, 6, 7, 91, 33], [90, 3, 3, 41, 17, 60, 61, 62]]
LONGEST = max(map(len, PROMPTS))
PADS = [[0] * (LONGEST - len(prompt)) for prompt in PROMPTS]
ONES = [[1] * len(prompt) for prompt in PROMPTS]
LEFT = [pads + prompt for pads, prompt in zip(PADS, PROMPTS, strict=True)]
LEFT_MASK = [pads + ones for pads, ones in zip(PADS, ONES, strict=True)]
RIGHT = [prompt + pads for pads, prompt in zip(PADS, PROMPTS, strict=True)]
RIGHT_MASK = [ones + pads for pads, ones in zip(PADS, ONES, strict=True)]
REQUESTS = [
    *(([prompt], [ones], NUM_NEW) for prompt, ones in zip(PROMPTS, ONES, strict=True)),
    (LEFT, LEFT_MASK, NUM_NEW),
    (RIGHT, RIGHT_MASK, 0),
]


@pytest.fixture(scope="module")
def folders(onnx_folder: Path, dense_onnx_folders: dict[str, Path]) -> dict[str, Path]:
    return {"routed": onnx_folder, **dense_onnx_folders}


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What optimum makes of the requests, by the name of the folder."""
    assert (OVERLAY / ".installed").is_file(), "there is no optimum to test with; run make optimum"
    asked, answered = (tmp_path_factory.mktemp("optimum") / name for name in ("asked.json", "answered.json"))
    asked.write_text(json.dumps({str(folder): REQUESTS for folder in folders.values()}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tests" / "run_in_optimum.py"), str(asked), str(answered)]
    environment = {**os.environ, "PYTHONPATH": str(OVERLAY), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(answered.read_text(encoding="utf-8"))
    return {name: found[str(folder)] for name, folder in folders.items()}


def ours(folder: Path, prompt: list[int]) -> list[int]:
    config = GenerationConfig(max_new_tokens=NUM_NEW, eos_token_id=-1)
    session = RoutedSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    sequence: list[int] = generate(session, torch.tensor([prompt]), config).sequence[0].tolist()
    return sequence[len(prompt) :]


@pytest.mark.parametrize("name", FOLDERS)
def test_each_prompt_is_continued_as_by_us(answers: dict[str, list[Any]], folders: dict[str, Path], name: str) -> None:
    expected = [ours(folders[name], prompt) for prompt in PROMPTS]
    assert [tokens for (tokens,) in answers[name][: len(PROMPTS)]] == expected
    assert len({token for tokens in expected for token in tokens}) > 3


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_padded_on_the_left_are_continued_as_alone(answers: dict[str, list[Any]], name: str) -> None:
    *alone, together, _ = answers[name]
    assert together == [tokens for (tokens,) in alone]


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_rows_padded_on_the_right_are_ours(
    answers: dict[str, list[Any]], folders: dict[str, Path], name: str
) -> None:
    session = RoutedSession(folders[name] / MODEL_FILE, providers=["CPUExecutionProvider"])
    for prompt, logits in zip(PROMPTS, answers[name][-1], strict=True):
        tokens = np.array([prompt])
        alone, _, _ = session.run(tokens, np.ones_like(tokens), np.arange(len(prompt))[None], session.empty_cache(1))
        np.testing.assert_allclose(logits[: len(prompt)], alone[0], rtol=0, atol=1e-4)
