"""Run PyTorch's hard graph and ONNX Runtime side by side."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from modcompile.export.session import RoutedSession
from modcompile.export.subject import Subject
from modcompile.export.verification_inputs import Case


@dataclass(frozen=True)
class PairedStep:
    """One call in both runtimes: logits `[B, T, V]`, routes `[R, B, T]`, tokens that are not padding `[B, T]`.

    `onnx_branches` says for each routed layer which branch was taken.
    """

    torch_logits: np.ndarray
    onnx_logits: np.ndarray
    torch_routes: np.ndarray
    onnx_routes: np.ndarray
    onnx_branches: list[int]
    tokens: np.ndarray
    next_tokens: np.ndarray
    """What the text goes on with, `[B, T]`, or `[B, 0]` at its end."""

    def losses(self) -> tuple[float, float, int]:
        """Summed cross-entropy of the next tokens in both runtimes, and how many there were."""
        targets = torch.from_numpy(self.next_tokens)
        both = []
        for logits in (self.torch_logits, self.onnx_logits):
            predicting = torch.from_numpy(logits[:, : targets.shape[1]]).flatten(0, 1)
            both.append(float(torch.nn.functional.cross_entropy(predicting, targets.flatten(), reduction="sum")))
        return both[0], both[1], targets.numel()


def paired_steps(subject: Subject, session: RoutedSession, case: Case) -> Iterator[PairedStep]:
    """The prefill of a case and its decode steps, each with the cache of its own runtime."""
    ids, mask = case.prefill_arrays()
    decodes = np.array(case.decodes)
    torch_cache, onnx_cache = None, session.empty_cache(len(ids))
    for index in range(decodes.shape[1] + 1):
        if index:
            ids = decodes[:, index - 1 : index]
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        with torch.no_grad():
            output = subject(
                torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(positions), torch_cache, use_cache=True
            )
        torch_cache = output.past_key_values
        logits, onnx_cache, told = session.run(ids, mask, positions, onnx_cache)
        routes, branches = subject.onnx_routes(told, ids)
        next_tokens = np.concatenate([ids[:, 1:], decodes[:, index : index + 1]], 1)
        yield PairedStep(
            output.logits.numpy(),
            logits,
            subject.torch_routes(output),
            routes,
            branches,
            mask[:, -ids.shape[1] :] != 0,
            next_tokens,
        )


def largest(difference: np.ndarray) -> float:
    """The largest magnitude in an array, infinite if it holds NaN."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0))
