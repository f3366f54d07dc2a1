"""How fast an exported folder decodes at the points of a sweep."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.errors import ArtifactError, ConfigError

_ROUNDS = 3
_STEPS, _UNTIMED = 24, 3


class SweepSpeed:
    """A session on `folder/onnx`, which must have all of a model's gates; with a thread for every core.

    Raises:
        ArtifactError: the folder has no artifact, or ONNX Runtime can't load it.
        ConfigError: there is no ONNX Runtime; or gates are folded.
    """

    def __init__(self, folder: Path, gates: int) -> None:
        try:
            from modcompile.export.session import MODEL_FILE, RoutedSession
        except ModuleNotFoundError as error:
            raise ConfigError(f"--sweep_speed needs {error.name}: pip install onnxruntime") from error
        model_file = folder / "onnx" / MODEL_FILE
        if not model_file.is_file():
            raise ArtifactError(
                f"{folder} has no onnx folder for --sweep_speed; run python -m modcompile.export {folder}"
            )
        self._session = RoutedSession(model_file)
        if self._session.num_thresholds != gates:
            raise ConfigError(
                f"{model_file} has {self._session.num_thresholds} of {gates} gates, the others are folded; for "
                "--sweep_speed export with --fold_gates none"
            )

    def measure(
        self, thresholds: Mapping[str, Sequence[Sequence[float]]], prompt: Sequence[int]
    ) -> dict[str, list[float]]:
        """Tokens a second of one row after a prompt, at the thresholds of each point of each way, by its name.

        The points take turns; what is told is the median step of each.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        times: dict[str, list[list[float]]] = {way: [[] for _ in points] for way, points in thresholds.items()}
        for _ in range(_ROUNDS):
            for way, points in thresholds.items():
                for taken, point in zip(times[way], points, strict=True):
                    taken += self._seconds(point, prompt)
        return {way: [1 / statistics.median(taken) for taken in points] for way, points in times.items()}

    def _seconds(self, thresholds: Sequence[float], prompt: Sequence[int]) -> list[float]:
        # Only here, as above.
        from modcompile.export.decoder import Decoder

        self._session.thresholds = list(thresholds)
        decoder = Decoder(self._session, 1, len(prompt) + _UNTIMED + _STEPS)
        logits, _ = decoder.step(np.array([prompt]))
        seconds = []
        for _ in range(_UNTIMED + _STEPS):
            start = perf_counter()
            logits, _ = decoder.step(logits[:, -1:].argmax(-1))
            seconds.append(perf_counter() - start)
        return seconds[_UNTIMED:]
