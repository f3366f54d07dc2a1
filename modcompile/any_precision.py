"""Weights in the layout of any-precision-llm (https://github.com/SNU-ARC/any-precision-llm): codes in tables of values.

A code of P bits stands in P planes, one a bit, the most significant first; the code of a lower precision is its first
bits, and each precision has a table of its own that says, for each row, which value a code is.

In a plane, the K bits of a row are K / 32 words, in runs of 32 words; the last run has those that are left. A run of T
words holds 32 T bits, as four stretches of 8 T. Each word has 8 bits of every stretch, the first stretch in its highest
byte, and the first bit in the highest of the byte::

    input feature s * 8T + 8t + i of the run  ↔  bit 31 - 8s - i of word t          s < 4, t < T, i < 8
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

WORD_BITS = 32
_RUN_WORDS = 32


@dataclass(frozen=True)
class LookupWeight:
    """One weight `[N, K]` at several precisions."""

    planes: torch.Tensor
    """int32 `[P, N, K / 32]`."""
    tables: Mapping[int, torch.Tensor]
    """By precision, float16 `[N, 2 ** precision]`."""

    def dequantize(self, precision: int) -> torch.Tensor:
        """The float32 weight at `precision`."""
        codes = unpack_planes(self.planes[:precision])
        return self.tables[precision].float().gather(1, codes.long())


def unpack_planes(planes: torch.Tensor) -> torch.Tensor:
    """int32 `[P, N, K / 32]` → codes of P bits, uint8 `[N, K]`; P is 8 at most."""
    shifts = torch.arange(WORD_BITS - 1, -1, -1, dtype=torch.int32, device=planes.device)
    codes = torch.zeros(*planes.shape[1:], WORD_BITS, dtype=torch.uint8, device=planes.device)
    for plane in planes:
        codes = codes << 1 | (plane.unsqueeze(-1) >> shifts & 1).to(torch.uint8)
    # Of each run `[N, T, 4 * 8]`, the stretches are put before the words.
    runs = [run.unflatten(2, (4, 8)).transpose(1, 2).flatten(1) for run in codes.split(_RUN_WORDS, 1)]
    return torch.cat(runs, 1)
