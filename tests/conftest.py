"""Fixtures shared by all tests."""

import shutil
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from datasets import Dataset
from hypothesis import settings
from torch import fx
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modcompile.artifacts import base_files, write_routed_folder
from modcompile.checkpoints import save_base
from modcompile.export import verification_inputs
from modcompile.export.build_model import build_model
from modcompile.export.export_config import ExportConfig
from modcompile.export.export_folder import export_folder
from modcompile.export.genai_config import write_genai_config
from modcompile.export.session import MODEL_FILE
from modcompile.sampling import load_generation_config
from tests.dense_folders import DENSE_ARCHITECTURES, write_dense_folder
from tests.tiny_graphs import flat_graph, outlined_graph, shared_model
from tests.tiny_models import ARCHITECTURES, VOCAB_SIZE
from tests.tiny_quantized import save_deciding_routers, write_tiny_quantized
from tests.tiny_routed import tiny_base, tiny_routed
from tests.tiny_tokenizer import make_tokenizer

# The same examples in every run: a failure is then the change's, not the draw's.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(architecture: str) -> PreTrainedModel:
    """A tiny model of the architecture, shared by all tests: not to be changed."""
    return shared_model(architecture)


@pytest.fixture(scope="session")
def flat(architecture: str) -> fx.GraphModule:
    """Its trace, as `drop_guards` leaves it."""
    return flat_graph(architecture)


@pytest.fixture(scope="session")
def outlined(architecture: str) -> fx.GraphModule:
    """Its graph in outlined form."""
    return outlined_graph(architecture)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """A tiny LLaMA, shared by all tests: not to be changed."""
    return shared_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens with EOS and padding, shared by all tests: not to be changed."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def base_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `tiny_base` with its tokenizer, shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    save_base(tiny_base(), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def random_text() -> Dataset:
    """Three sequences of 16, 16 and 9 tokens that all tiny models have, as `tokenize_and_pack` makes them."""
    ids = torch.randint(3, VOCAB_SIZE, (3, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": ids.tolist()})


@pytest.fixture(scope="session")
def padded_rows() -> Dataset:
    """16 sequences of 32 random tokens that `tiny_base` has; of every second one 12 are padding."""
    ids = torch.randint(3, 300, (16, 32), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(32) < torch.tensor([32, 20]).repeat(8).unsqueeze(1)).long()
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some two thousand tokens of text."""
    file = tmp_path_factory.mktemp("text") / "train.txt"
    file.write_text("".join(f"Line {index} says little that line {index - 1} did not.\n" for index in range(60)))
    return file


@pytest.fixture(scope="session")
def routed_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The routed folder of `tiny_routed`, shared by all tests: not to be changed."""
    folder = tmp_path_factory.mktemp("routed") / "tiny"
    write_routed_folder(tiny_routed("straight_through"), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def quantized_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized folder of `write_tiny_quantized`, shared by all tests: not to be changed."""
    return write_tiny_quantized(tmp_path_factory.mktemp("quantized") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def onnx_folder(
    routed_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What an export makes of it at a threshold of 0.5, with --emit_routing; in a routed folder, not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "tiny" / "onnx"
    shutil.copytree(routed_folder, folder.parent)
    folder.mkdir()
    model = tiny_routed("straight_through")
    model.set_router_mode(0.5)
    onnx_model = build_model(model.hard_graph(), emit_routing=True)
    write_genai_config(folder, onnx_model, model.config, load_generation_config(routed_folder, model.config), tokenizer)
    ir.save(onnx_model, folder / MODEL_FILE, external_data=f"{MODEL_FILE}.data")
    for file in base_files(routed_folder):
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def dense_onnx_folders(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exports of tiny models without routers, by their architectures; not to be changed."""
    parent = tmp_path_factory.mktemp("dense")
    return {name: write_dense_folder(name, tokenizer, parent / name) for name in DENSE_ARCHITECTURES}


@pytest.fixture(scope="session")
def silent_onnx_folder(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without --emit_routing."""
    folder = tmp_path_factory.mktemp("silent") / "onnx"
    shutil.copytree(onnx_folder, folder)
    model = ir.load(folder / MODEL_FILE)
    model.graph.outputs[:] = [value for value in model.graph.outputs if not str(value.name).startswith("routing.")]
    ir.save(model, folder / MODEL_FILE)
    return folder


@pytest.fixture(scope="session")
def precision_onnx_folder(quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export with --emit_routing makes of it and routers that decide, in the exported folder.

    Loaded, built, verified and written as the command does. Not to be changed.
    """
    folder = tmp_path_factory.mktemp("precisions") / "tiny"
    shutil.copytree(quantized_folder, folder)
    save_deciding_routers(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verification_inputs, "NUM_DECODE_STEPS", 1)  # that saves time
        export_folder(folder, folder / "onnx", ExportConfig(emit_routing=True))
    return folder / "onnx"
