import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedTokenizerFast

from modcompile.artifacts import save_depth_routers
from modcompile.cli import run
from modcompile.config import RouterConfig
from modcompile.generate import main
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_router_files import save_precision_routers
from tests.tiny_quantized import NUM_LAYERS, let_routers_decide, plain_model, write_tiny_quantized

PROMPT = "Names refer to"
NEW_TOKENS = 12

Generated = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder whose routers decide; not to be changed."""
    path = write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", tokenizer)
    model = LayerwiseQuantizeForCausalLM.from_quantized(path)
    let_routers_decide(model)
    save_precision_routers(model.routers, model.router_config, model.precisions, path)
    return path


@pytest.fixture
def gated(folder: Path, tmp_path: Path) -> Path:
    """The same with a depth gate at every block."""
    own = Path(shutil.copytree(folder, tmp_path / "gated"))
    config = RouterConfig(router_hidden_size=8)
    model = LayerwiseQuantizeForCausalLM.from_quantized(own, depth=config)
    save_depth_routers(model.depth_routers, config, own)
    return own


@pytest.fixture
def generated(capsys: pytest.CaptureFixture[str]) -> Generated:
    """What the command prints, and the line after it."""

    def call(folder: Path, *flags: str) -> tuple[str, str]:
        capsys.readouterr()
        main([str(folder), "--prompt", PROMPT, "--max_new_tokens", str(NEW_TOKENS), *flags])
        captured = capsys.readouterr()
        return captured.out, captured.err.splitlines()[-1]

    return call


def _step_by_step(folder: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[str, float, float]:
    """The greedy text, and the average bits of the prompt and of the tokens after it, counted one by one."""
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    sequence = new_tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    cache, calls = DynamicCache(), list[list[int]]()
    for _ in range(NEW_TOKENS):
        output = model.infer_forward(new_tokens, torch.ones_like(sequence), past_key_values=cache)
        assert output.logits is not None
        assert output.num_bits is not None
        calls.append(torch.cat(output.num_bits).flatten().tolist())
        new_tokens = output.logits[:, -1:].argmax(-1)
        sequence = torch.cat([sequence, new_tokens], 1)
    prompt, new = calls[0], [bits for call in calls[1:] for bits in call]
    text = str(tokenizer.decode(sequence[0], skip_special_tokens=True))
    return text, sum(prompt) / len(prompt), sum(new) / len(new)


def test_routers_choose_for_the_prompt_and_for_each_token(
    folder: Path, tokenizer: PreTrainedTokenizerFast, generated: Generated
) -> None:
    text, of_prompt, of_new = _step_by_step(folder, tokenizer)
    assert of_prompt != of_new
    printed, line = generated(folder)
    assert printed == text + "\n"
    rates = r"prefill \d+\.\d tokens/s, decode \d+\.\d tokens/s"
    bits = f"average bits {of_prompt:.2f} in the prompt, {of_new:.2f} in new tokens"
    assert re.fullmatch(f"{NEW_TOKENS} new tokens, {rates}, {bits}", line), line


@pytest.mark.parametrize("bits", [2, 16])
def test_fixed_precision_is_the_plain_model_of_these_weights(
    folder: Path, tokenizer: PreTrainedTokenizerFast, generated: Generated, bits: int
) -> None:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    model: Any = plain_model(folder, (bits,) * NUM_LAYERS)
    expected = model.generate(
        input_ids=encoded.input_ids, attention_mask=encoded.attention_mask, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    printed, line = generated(folder, "--fix_precision", str(bits))
    assert printed == str(tokenizer.decode(expected[0], skip_special_tokens=True)) + "\n"
    assert line.endswith(f"average bits {bits:.2f} in the prompt, {bits:.2f} in new tokens")


def test_a_single_new_token_is_not_computed_with(folder: Path, generated: Generated) -> None:
    _, line = generated(folder, "--fix_precision", "4", "--max_new_tokens", "1")
    assert re.fullmatch(r"1 new token, prefill \d+\.\d tokens/s, average bits 4\.00 in the prompt", line), line


def test_depth_gates_take_a_threshold(gated: Path, generated: Generated) -> None:
    """At 0 all blocks run, above 1 none does."""
    flags = ["--fix_precision", "4"]
    printed, line = generated(gated, *flags, "--hard_threshold", "0")
    assert line.endswith("average bits 4.00 in the prompt, 4.00 in new tokens")
    skipped, line = generated(gated, *flags, "--hard_threshold", "2")
    assert line.endswith("average bits 0.00 in the prompt, 0.00 in new tokens")
    assert printed != skipped


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fix_precision", "8"], "has no weights of 8 bits; it has 2, 4, 16"),
        (["--hard_threshold", "0.5"], "--hard_threshold needs depth gates"),
        (["--max_new_tokens", "128"], "more than the 128 positions"),
        (["--fix_precision", "4", "--runtime", "onnx"], "--fix_precision has no effect with --runtime onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_end_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(partial(main, [str(folder), "--prompt", PROMPT, *flags])) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_routed_folder_has_no_precision_to_fix(routed_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(partial(main, [str(routed_folder), "--prompt", PROMPT, "--fix_precision", "4"])) == 2
    assert "--fix_precision needs weights at several precisions" in capsys.readouterr().err
