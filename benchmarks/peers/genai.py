"""The worker of onnxruntime-genai, run by the Python of the peers.

Its cache is one buffer of the sequence's capacity; the threads are set, as by default it takes one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og

from benchmarks.peers.timed_worker import Engine, Logits, serve


class _Generator:
    def __init__(self, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder, threads
        config = json.loads((folder / "genai_config.json").read_text())["model"]
        self._num_layers = config["decoder"]["num_hidden_layers"]
        self._cache_shape = (1, config["decoder"]["num_key_value_heads"], 0, config["decoder"]["head_size"])
        self._last_token = config["vocab_size"] - 1
        self._model: Any = None

    def start(self, capacity: int) -> None:
        if self._model is None:
            config = og.Config(str(self._folder))
            # A sequence that ends early would be refused below, so it ends on a token that greedy search avoids.
            decoder = {"session_options": {"intra_op_num_threads": self._threads}}
            config.overlay(json.dumps({"model": {"eos_token_id": [self._last_token], "decoder": decoder}}))
            self._model = og.Model(config)
        options = og.GeneratorParams(self._model)
        options.set_search_options(max_length=capacity, do_sample=False, past_present_share_buffer=True)
        self._generator = og.Generator(self._model, options)

    def prefill(self, ids: Sequence[int]) -> int:
        self._generator.append_tokens(np.array([ids], np.int32))
        return self._next()

    def step(self, token: int) -> int:
        return self._next()  # It keeps the token itself.

    def _next(self) -> int:
        if self._generator.is_done():
            raise RuntimeError("onnxruntime-genai ended the sequence early; the times would not be of whole steps")
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def logits(self, ids: Sequence[int]) -> Logits:
        """By plain ONNX Runtime: genai itself hands out those of the last token."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = ort.InferenceSession(str(self._folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        empty = np.zeros(self._cache_shape, np.float32)
        feeds = {
            f"past_key_values.{layer}.{part}": empty for layer in range(self._num_layers) for part in ("key", "value")
        }
        feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        (logits,) = session.run(["logits"], feeds)
        rows: Logits = logits[0]
        return rows


def load(model: dict[str, Any], threads: int) -> Engine:
    """What its builder has written into `folder`."""
    return _Generator(Path(model["folder"]), threads)


if __name__ == "__main__":
    serve(load)
