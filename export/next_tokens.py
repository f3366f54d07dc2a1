"""Choose the next token of every row from its logits, as transformers does."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modcompile.export.step_binding import Array


class NextTokens:
    """Greedy, or with `do_sample` drawn by `temperature`, `top_k` and `top_p` from `generator`."""

    def __init__(self, config: GenerationConfig, generator: torch.Generator | None) -> None:
        self._sample = bool(config.do_sample)
        self._generator = generator
        self._processors = LogitsProcessorList()  # those that transformers would apply, in its order
        if config.temperature is not None and config.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self._processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1:
            self._processors.append(TopPLogitsWarper(config.top_p))

    def choose(self, logits: Sequence[Array]) -> list[int]:
        """A token for each row, from its logits `[V]`."""
        if not self._sample:
            # In NumPy, which takes a twentieth of PyTorch's time for it.
            return [int(row.argmax()) for row in logits]
        before = cast(torch.LongTensor, torch.empty(len(logits), 0, dtype=torch.long))  # what none of them looks at
        scores = self._processors(before, torch.from_numpy(np.stack(logits)).float())
        return torch.multinomial(scores.softmax(-1), 1, generator=self._generator)[:, 0].tolist()
