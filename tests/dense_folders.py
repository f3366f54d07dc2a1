"""Exported folders of the tiny models without routers."""

from pathlib import Path

import onnx_ir as ir
from transformers import GenerationConfig, PreTrainedTokenizerBase

from modcompile.checkpoints import save_base
from modcompile.export.build_model import build_model
from modcompile.export.genai_config import write_genai_config
from modcompile.export.session import MODEL_FILE
from tests.tiny_graphs import outlined_graph, shared_model

DENSE_ARCHITECTURES = ("llama", "opt", "gpt2")
"""With rotary embeddings, and with absolute positions that begin at 2 and at 0."""


def write_dense_folder(architecture: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The folder as an export would leave it, but for its verification.

    The tokenizer is there to be found: the models have fewer tokens than it.
    """
    model = shared_model(architecture)
    save_base(model, tokenizer, folder)
    (folder / "model.safetensors").unlink()
    onnx_model = build_model(outlined_graph(architecture))
    generation_config = model.generation_config
    assert isinstance(generation_config, GenerationConfig)
    write_genai_config(folder, onnx_model, model.config, generation_config, tokenizer)
    ir.save(onnx_model, folder / MODEL_FILE)
    return folder
