import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from transformers import GenerationConfig

from modcompile import status_line
from modcompile.cli import run
from modcompile.errors import ArtifactError, CheckpointError, ConfigError, ModcompileError
from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.generate import main
from tests.tiny_tokenizer import make_tokenizer

PROMPT = "Names refer to"

Printed = Callable[..., str]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """What the command prints on stdout."""

    def call(folder: Path, *flags: str) -> str:
        capsys.readouterr()
        main([str(folder), "--prompt", PROMPT, *flags])
        return capsys.readouterr().out

    return call


@pytest.fixture
def own_folder(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy of the routed folder, with its export, that a test may change."""
    return Path(shutil.copytree(onnx_folder.parent, tmp_path / "own"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--max_new_tokens", "20"],
        ["--hard_threshold", "0"],
        ["--do_sample", "--temperature", "0.7", "--top_k", "20", "--top_p", "0.9"],
    ],
    ids=" ".join,
)
def test_both_runtimes_print_the_same(onnx_folder: Path, printed: Printed, flags: list[str]) -> None:
    text = printed(onnx_folder.parent, *flags)
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT) + 10
    assert printed(onnx_folder.parent, "--runtime", "onnx", *flags) == text


def test_flags_change_the_text(onnx_folder: Path, printed: Printed) -> None:
    given = partial(printed, onnx_folder, "--runtime", "onnx")
    texts = [given(), given("--hard_threshold", "0"), given("--hard_threshold", "2"), given("--do_sample")]
    texts += [given("--do_sample", "--seed", "7"), given("--max_new_tokens", "3")]
    assert len(set(texts)) == len(texts)
    assert given("--do_sample", "--seed", "7") == texts[4]


def test_onnx_takes_the_exported_folder_itself(onnx_folder: Path, printed: Printed) -> None:
    assert printed(onnx_folder, "--runtime", "onnx") == printed(onnx_folder.parent, "--runtime", "onnx")


@pytest.mark.parametrize(
    ("runtime", "threshold", "active_ratio"),
    [("torch", "0", "1.000"), ("onnx", "0", "1.000"), ("onnx", "0.5", "0.[1-9][0-9]*"), ("onnx", "2", "0.000")],
)
def test_tells_speed_and_active_ratio(
    onnx_folder: Path, capsys: pytest.CaptureFixture[str], runtime: str, threshold: str, active_ratio: str
) -> None:
    main([str(onnx_folder.parent), "--prompt", PROMPT, "--runtime", runtime, "--hard_threshold", threshold])
    line = capsys.readouterr().err.splitlines()[-1]
    rates = r"prefill \d+\.\d tokens/s, decode \d+\.\d tokens/s"
    assert re.fullmatch(rf"50 new tokens, {rates}, active ratio {active_ratio}", line), line


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_number_of_threads_is_for_this_text_only(onnx_folder: Path, printed: Printed, runtime: str) -> None:
    before = torch.get_num_threads()
    flags = ["--runtime", runtime, "--max_new_tokens", "6"]
    text = printed(onnx_folder.parent, *flags)
    assert printed(onnx_folder.parent, *flags, "--num_threads", "3") == text
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_terminal_shows_the_same_as_it_goes(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch, printed: Printed, runtime: str
) -> None:
    """In its last row, by the escapes for it; the text has nothing of that."""
    written = io.StringIO()
    master, slave = pty.openpty()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr(written, "fileno", lambda: slave)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(status_line, "_INTERVAL", 0.0)
    flags = ["--runtime", runtime, "--max_new_tokens", "3"]
    text = printed(onnx_folder.parent, *flags)
    monkeypatch.setattr("sys.stderr", written)
    assert printed(onnx_folder.parent, *flags) == text
    os.close(master)
    os.close(slave)
    shown = re.findall(r"\033\[24;1H\033\[2m(.*?)\033\[m", written.getvalue())
    rates = [r", prefill [\d.]+ tokens/s", r", prefill [\d.]+ tokens/s, decode [\d.]+ tokens/s"]
    expected = [
        r"reading the prompt, \d+ tokens",
        rf"1 new token{rates[0]}, active ratio [\d.]+",
        *(rf"{count} new tokens{rates[1]}, active ratio [\d.]+" for count in (2, 3)),
    ]
    for line, pattern in zip(shown, expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert written.getvalue().splitlines()[-1].endswith(shown[-1].split(", ")[-1])


def test_artifact_that_does_not_tell_its_routes(silent_onnx_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(silent_onnx_folder), "--prompt", PROMPT, "--runtime", "onnx", "--max_new_tokens", "1"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"1 new token, prefill \d+\.\d tokens/s, active ratio not told .* --emit_routing\)", line)


def test_tells_average_bits_in_onnx(precision_onnx_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the prompt, those that PyTorch tells; new tokens may differ, as activations are rounded in one only."""
    folder, flags = precision_onnx_folder.parent, ["--max_new_tokens", "4"]
    lines = {}
    for runtime in ("torch", "onnx"):
        main([str(folder), "--prompt", PROMPT, "--runtime", runtime, *flags])
        captured = capsys.readouterr()
        assert captured.out.startswith(PROMPT)
        lines[runtime] = captured.err.splitlines()[-1]
    told = r"average bits \d+\.\d\d in the prompt"
    (of_torch, of_onnx) = (re.search(told, lines[runtime]) for runtime in ("torch", "onnx"))
    assert of_torch is not None and of_onnx is not None
    assert of_torch[0] == of_onnx[0]
    rates = r"prefill \d+\.\d tokens/s, decode \d+\.\d tokens/s"
    assert re.fullmatch(rf"4 new tokens, {rates}, {told}, \d+\.\d\d in new tokens", lines["onnx"])


def test_artifact_that_does_not_tell_its_precisions(
    precision_onnx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Path(shutil.copytree(precision_onnx_folder, tmp_path / "onnx"))
    model = ir.load(silent / MODEL_FILE)
    model.graph.outputs[:] = [value for value in model.graph.outputs if not str(value.name).startswith("precision.")]
    ir.save(model, silent / MODEL_FILE)
    main([str(silent), "--prompt", PROMPT, "--runtime", "onnx", "--max_new_tokens", "1"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(", average bits not told by this artifact (export it with --emit_routing)")


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_threshold_needs_gates(precision_onnx_folder: Path, runtime: str) -> None:
    with pytest.raises(ConfigError, match=r"^--hard_threshold needs depth gates, which .* has not; leave it out$"):
        main([str(precision_onnx_folder.parent), "--prompt", PROMPT, "--runtime", runtime, "--hard_threshold", "0.5"])


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_stops_at_one_of_several_ends(own_folder: Path, capsys: pytest.CaptureFixture[str], runtime: str) -> None:
    prompt = make_tokenizer()(PROMPT, return_tensors="pt").input_ids
    greedy = GenerationConfig(max_new_tokens=50, do_sample=False)
    tokens = generate(RoutedSession(own_folder / "onnx" / MODEL_FILE), prompt, greedy).sequence[0, prompt.shape[1] :]
    end = next(token for index, token in enumerate(tokens.tolist()) if index > 3 and token not in tokens[:index])
    path = (own_folder if runtime == "torch" else own_folder / "onnx") / "generation_config.json"
    # Of what else the file may say, greedy generation takes nothing.
    path.write_text(json.dumps({"eos_token_id": [299, end], "repetition_penalty": 1.5, "no_repeat_ngram_size": 1}))
    main([str(own_folder), "--prompt", PROMPT, "--runtime", runtime])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{tokens.tolist().index(end) + 1} new tokens")


def test_chat_prints_the_answer_only(own_folder: Path, printed: Printed) -> None:
    (own_folder / "onnx" / "chat_template.jinja").write_text("<bos>{{ messages[0]['content'] }}<eos><bos>")
    answer = printed(own_folder, "--runtime", "onnx", "--chat")
    assert answer.strip()
    assert PROMPT not in answer
    assert answer != printed(own_folder, "--runtime", "onnx").removeprefix(PROMPT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hard_threshold", "nan"], "--hard_threshold is nan"),
        (["--num_threads", "0"], "--num_threads is 0"),
        (["--hard_threshold", "-1"], "--hard_threshold is -1"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--max_new_tokens", "126"], "more than the 128 positions of the model"),
        (["--temperature", "0.5"], "--temperature has no effect without --do_sample"),
        (["--chat"], "--chat needs a chat template"),
        (["--prompt", ""], "--prompt is empty"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_bad_options_end_in_one_line(
    onnx_folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str, runtime: str
) -> None:
    argv = [str(onnx_folder.parent), "--prompt", PROMPT, "--runtime", runtime, *flags]
    assert run(partial(main, argv)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("remove", "flags", "error", "message"),
    [
        (".", [], ArtifactError, "own is not a folder"),
        (".", ["--runtime", "onnx"], ArtifactError, "own is not a folder"),
        ("router_config.json", [], ArtifactError, r"own has no router_config\.json"),
        ("onnx", ["--runtime", "onnx"], ArtifactError, r"has no model\.onnx, .*; run python -m modcompile\.export"),
        ("onnx/config.json", ["--runtime", "onnx"], CheckpointError, r"has no config\.json"),
        ("onnx/model.onnx.data", ["--runtime", "onnx"], ArtifactError, r"can't load .*model\.onnx"),
        ("tokenizer*.json", [], ArtifactError, "own has no tokenizer"),
        ("onnx/tokenizer*.json", ["--runtime", "onnx"], ArtifactError, "onnx has no tokenizer"),
    ],
)
def test_missing_parts_are_named(
    own_folder: Path, remove: str, flags: list[str], error: type[ModcompileError], message: str
) -> None:
    removed = [own_folder] if remove == "." else list(own_folder.glob(remove))
    assert removed
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(error, match=message):
        main([str(own_folder), "--prompt", PROMPT, *flags])


def test_missing_runtime_is_named(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modcompile.export.session", "modcompile.export.generation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="--runtime onnx needs onnxruntime: pip install"):
        main([str(onnx_folder), "--prompt", PROMPT, "--runtime", "onnx"])


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    usage, *entries = re.split(r"\n  (?=-)", capsys.readouterr().out)
    assert "python -m modcompile.generate" in usage
    explained = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    flags = ["prompt", "runtime", "hard_threshold", "num_threads", "chat", "max_new_tokens"]
    for flag in [*flags, "do_sample", "temperature", "top_k", "top_p", "seed"]:
        assert flag == "prompt" or "(default: " in explained[f"--{flag}"]
        assert len(explained[f"--{flag}"].split()) > 5
