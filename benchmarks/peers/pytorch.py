"""The worker of PyTorch in eager mode, fp32: the plain model of transformers, or routed with soft gates."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.peers.timed_worker import Engine, Logits, serve
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base
from modcompile.config import RouterConfig
from modcompile.routed_graph import build_routed


class _Eager:
    """A growing cache, as `generate` has it."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self.start(0)

    def start(self, capacity: int) -> None:
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> int:
        output = self._model(torch.tensor([ids]), past_key_values=self._cache, use_cache=True, **self._options)
        self._cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    def step(self, token: int) -> int:
        return self.prefill([token])

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Logits:
        rows: Logits = self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return rows


def load(model: dict[str, Any], threads: int) -> Engine:
    """The model of `folder`: dense, or with `soft_gates` every block's gate computed, and every block run and mixed.

    The rewritten graph computes the logits of every token of a prompt, transformers those of the last.
    """
    torch.set_num_threads(threads)
    base = load_base(find_checkpoint(model["folder"])).float()
    if not model["soft_gates"]:
        return _Eager(base, {"logits_to_keep": 1})
    routed = build_routed(base, RouterConfig(gate="soft"))
    routed.set_router_mode(None)
    return _Eager(routed, {})


if __name__ == "__main__":
    serve(load)
