"""The other side: who is installed, and their models, made from the weights everyone has."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.built_model import build_once
from benchmarks.peers.case import Case
from benchmarks.peers.child_python import run_module
from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.source import Source

_BUILDER = ("accuracy_level=4", "hf_token=false")
_LAST_LOGITS = "prune_lm_head=true"
_GENAI_BUILDS = {
    "onnxruntime-genai int4": ("block_size=32",),
    "onnxruntime-genai int4, fused gate and up, last logits": (
        "block_size=32",
        "fuse_mlp_gate_up=true",
        _LAST_LOGITS,
    ),
    "onnxruntime-genai int4, groups of 128": ("block_size=128",),
}
"""As its builder makes it; with the options of the builder that make it faster, on the same weights; and coarser."""
_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"


def installed_version(python: Path, package: str) -> str | None:
    """The version of `package` in the environment of `python`, None if it or its environment is not there."""
    if not python.is_file():
        return None
    done = subprocess.run([python, "-c", _VERSION, package], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def genai_cases(source: Source, work: Path, python: Path) -> tuple[list[Case], dict[str, dict[str, float]]]:
    """The cases of onnxruntime-genai, and what there is to tell of their models."""
    cases, told = [], {}
    for name, options in _GENAI_BUILDS.items():
        folder = work / name.replace(" ", "_")
        told[name] = build_once(folder, partial(_build_genai, source, python, options))
        # Logits of the last token score no text.
        cases.append(Case(name, "genai", python, {"folder": str(folder)}, scored=_LAST_LOGITS not in options))
    return cases, told


def llama_cpp_cases(source: Source, work: Path, python: Path) -> tuple[list[Case], dict[str, dict[str, float]]]:
    """The cases of llama.cpp, and what there is to tell of their models."""
    folder = work / "llama.cpp"
    name = "llama.cpp Q4_0"
    told = build_once(folder, partial(_build_gguf, source))
    files = {name: folder / "model.gguf"}
    if source.gguf is not None:
        files["llama.cpp Q4_1, the file shipped"] = source.gguf
    cases = [
        # Scored once: both kinds of attention compute the same.
        Case(f"{file_name}{kind}", "llamacpp", python, {"file": str(file), "flash_attention": flash}, scored=not flash)
        for file_name, file in files.items()
        for kind, flash in ((", flash attention", True), ("", False))
    ]
    return cases, {name: told}


def pytorch_cases(source: Source) -> list[Case]:
    """Eager PyTorch: the plain model, and the seed method."""
    plain = {"folder": str(source.folder), "soft_gates": False}
    python = Path(sys.executable)
    return [
        Case("transformers fp32", "pytorch", python, plain),
        Case("soft gates in PyTorch fp32", "pytorch", python, plain | {"soft_gates": True}, scored=False),
    ]


PACKAGES = {"onnxruntime-genai": genai_cases, "llama-cpp-python": llama_cpp_cases}
"""What is installed for the peers, and what makes its cases."""


def _build_gguf(source: Source, output: Path) -> dict[str, float]:
    write_gguf(source.folder, output / "model.gguf", GGMLQuantizationType.Q4_0)
    return {}


def _build_genai(source: Source, python: Path, options: tuple[str, ...], output: Path) -> dict[str, float]:
    inputs, cache = output / "input", output / "cache"
    inputs.mkdir()
    for file in source.folder.iterdir():
        (inputs / file.name).symlink_to(file.resolve())
    if not source.reads_text:  # Its builder copies a tokenizer, whichever.
        words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(inputs)
    arguments = f"-m model -i {inputs} -o {output} -p int4 -e cpu -c {cache} --extra_options".split()
    run_module(
        python,
        "onnxruntime_genai.models.builder",
        [*arguments, *_BUILDER, *options],
        environment={"HF_HUB_OFFLINE": "1"},
    )
    for folder in (inputs, cache):
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    return {}
