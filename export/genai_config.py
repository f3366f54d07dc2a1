"""`genai_config.json`: what onnxruntime-genai is told of an exported model, and cannot ask it."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from modcompile.durable_files import write_json
from modcompile.export.session import MODEL_FILE
from modcompile.sampling import SamplingConfig

GENAI_CONFIG = "genai_config.json"
_CACHE, _IN_PLACE = "modcompile.cache", "in_place"

_SESSION_OPTIONS = {
    "log_id": "onnxruntime-genai",
    "log_severity_level": 3,  # else a line of warning for each optional input, at every load
    # As many threads as physical cores, wherever it runs. Left out, genai takes half the logical ones: one of two.
    "intra_op_num_threads": 0,
    "enable_mem_pattern": False,  # as in `RoutedSession`
    "provider_options": [],
}


def write_genai_config(
    folder: Path,
    model: ir.Model,
    config: PretrainedConfig,
    stored: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write the file, unless genai could not use it: it needs a tokenizer, and a number of positions.

    Every model is of genai's general type `decoder`, which asks for nothing of an architecture's own. Sampling and
    special tokens are those of `modcompile.generate`.

    Raises:
        OutputError: it can't be written.
    """
    if tokenizer is None or getattr(config, "max_position_embeddings", None) is None:
        return
    generation: Any = SamplingConfig(do_sample=True).generation_config(stored, tokenizer)
    special_tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (vocab_size,) = (_sizes(value)[-1] for value in model.graph.outputs if value.name == "logits")
    content = {
        "model": {
            "type": "decoder",
            "context_length": config.max_position_embeddings,
            "vocab_size": vocab_size,
            **{name: value for name, value in special_tokens.items() if value is not None},
            "decoder": _decoder(model, config),
        },
        "search": {
            "do_sample": bool(stored.do_sample),
            **{name: getattr(generation, name) for name in ("temperature", "top_k", "top_p")},
            "past_present_share_buffer": model.metadata_props.get(_CACHE) == _IN_PLACE,
        },
    }
    write_json(folder / GENAI_CONFIG, content)


def _decoder(model: ir.Model, config: PretrainedConfig) -> dict[str, Any]:
    inputs = {str(value.name): value for value in model.graph.inputs}
    keys = [name for name in inputs if name.startswith("past_key_values.") and name.endswith(".key")]
    _, num_key_value_heads, _, head_size = _sizes(inputs[keys[0]])
    tokens = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    return {
        "filename": MODEL_FILE,
        "session_options": _SESSION_OPTIONS,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_size": head_size,
        "num_hidden_layers": len(keys),
        "inputs": {**tokens, **past},
        "outputs": {"logits": "logits", **present},
    }


def _sizes(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return [size if isinstance(size, int) else None for size in value.shape]
