"""The worker of llama.cpp, by llama-cpp-python, run by the Python of the peers.

It calls llama.cpp's own functions, as the high-level class samples and copies logits in Python. All options are
llama.cpp's defaults but the threads, and whether its attention is the fused one (flash attention, which it takes by
default: prompts are then faster, and steps after a long context slower). Of a prompt it computes the logits of the last
token alone.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.timed_worker import Engine, Logits, serve

_CELLS = 256  # A cache is a multiple of so many tokens.


# Lines about every tensor are dropped. Kept here, since llama.cpp calls it for as long as the process lives.
_DROP_LOG = llama_cpp.llama_log_callback(lambda level, text, data: None)


class _Context:
    def __init__(self, file: str, flash_attention: bool, threads: int) -> None:
        llama_cpp.llama_log_set(_DROP_LOG, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp can't load {file}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._flash_attention, self._threads = flash_attention, threads
        self._context: Any = None

    def start(self, capacity: int) -> None:
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = -(-capacity // _CELLS) * _CELLS
        options.n_batch = max(options.n_batch, options.n_ctx)  # so that a prompt is one call; it cuts it by n_ubatch
        options.n_threads = options.n_threads_batch = self._threads
        kind = "ENABLED" if self._flash_attention else "DISABLED"
        options.flash_attn_type = getattr(llama_cpp, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def prefill(self, ids: Sequence[int]) -> int:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        self._decode(llama_cpp.llama_batch_get_one(tokens, len(ids)))
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(pointer, (self._vocab_size,)).argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    def logits(self, ids: Sequence[int]) -> Logits:
        self.start(len(ids))
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = token, index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        self._decode(batch)
        llama_cpp.llama_batch_free(batch)
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(ids), self._vocab_size))
        return np.array(rows)

    def _decode(self, batch: Any) -> None:
        if llama_cpp.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp can't run the model")


def load(model: dict[str, Any], threads: int) -> Engine:
    """A GGUF `file`, with or without `flash_attention`."""
    return _Context(model["file"], model["flash_attention"], threads)


if __name__ == "__main__":
    serve(load)
