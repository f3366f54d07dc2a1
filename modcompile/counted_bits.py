"""With how many bits a text was generated."""

from collections.abc import Sequence

import torch

from modcompile.precision_usage import PrecisionUsage


class CountedBits:
    """The bits of the prompt, which is the first call, and of new tokens, each a call after it."""

    def __init__(self) -> None:
        self.prompt, self.new_tokens = PrecisionUsage(), PrecisionUsage()
        self._current = self.prompt

    def update(self, num_bits: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        """Add a call: the bits `[B, T]`, integers, of every block, and the tokens' mask `[B, T]`."""
        self._current.update(num_bits, tokens)
        self._current = self.new_tokens

    def describe(self) -> str:
        """Both averages, in words."""
        prompt = f"average bits {self.prompt.average_bits:.2f} in the prompt"
        # What comes last is not computed with.
        return f"{prompt}, {self.new_tokens.average_bits:.2f} in new tokens" if self.new_tokens.shares else prompt
