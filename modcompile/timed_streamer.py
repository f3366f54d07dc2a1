"""Print text while it is generated, and keep the time."""

from collections.abc import Callable
from time import perf_counter

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TimedStreamer(TextStreamer):
    """Prints text to stdout word by word, without special tokens, and with `skip_prompt` without the prompt.

    After each put, `on_put` is called with it.

    Whoever generates puts the prompt before the prefill, then each token as soon as it is chosen: so does transformers'
    `generate`, and so does `modcompile.export.generation`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        skip_prompt: bool = False,
        on_put: Callable[["TimedStreamer"], None] | None = None,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._times: list[float] = []
        self._on_put = on_put
        self.prompt_tokens = 0
        """How many tokens the prompt has, once it was put."""

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated."""
        return max(len(self._times) - 1, 0)

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of the prompt per second until the first new token; None if there was none."""
        return self.prompt_tokens / (self._times[1] - self._times[0]) if self.new_tokens else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None if there was no second."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / (self._times[-1] - self._times[1])

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `[1, T]`, or a token `[1]`."""
        if not self._times:
            self.prompt_tokens = value.numel()
        self._times.append(perf_counter())
        super().put(value)
        if self._on_put is not None:
            self._on_put(self)
