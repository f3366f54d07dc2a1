"""How fast an exported folder decodes at the points of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.errors import ArtifactError, ConfigError, DataError

_ROUNDS = 3
_PROMPT, _UNTIMED, _STEPS = 32, 3, 24
TEXT_TOKENS = _PROMPT + _UNTIMED + _STEPS
"""Of a text of which all steps can be measured."""


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
        self, thresholds: Mapping[str, Sequence[Sequence[float]]], texts: Sequence[Sequence[int]]
    ) -> dict[str, list[float]]:
        """Tokens a second of one row, at the thresholds of each point of each way, by its name.

        What is decoded are the texts themselves, as a model skips more in what it repeats. The points take turns. As
        steps differ in what they skip, the mean of all counts, each by its median of the rounds.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
            DataError: no text is long enough to decode some of it.
        """
        long = [text for text in texts if len(text) > 2 * _UNTIMED]
        if not long:
            raise DataError(f"--sweep_speed decodes a text, and none has more than {2 * _UNTIMED} tokens; give more")
        times: dict[str, list[list[list[float]]]] = {way: [[] for _ in points] for way, points in thresholds.items()}
        for _ in range(_ROUNDS):
            for way, points in thresholds.items():
                for rounds, point in zip(times[way], points, strict=True):
                    rounds.append([step for text in long for step in self._seconds(point, text)])
        return {way: [1 / float(np.median(rounds, 0).mean()) for rounds in points] for way, points in times.items()}

    def _seconds(self, thresholds: Sequence[float], text: Sequence[int]) -> list[float]:
        # Only here, as above.
        from modcompile.export.decoder import Decoder

        self._session.thresholds = list(thresholds)
        taken = text[:TEXT_TOKENS]
        prompt = min(_PROMPT, len(text) // 2)
        decoder = Decoder(self._session, 1, len(taken))
        decoder.step(np.array([taken[:prompt]]))
        seconds = []
        for token in taken[prompt:]:
            start = perf_counter()
            decoder.step(np.array([[token]]))
            seconds.append(perf_counter() - start)
        return seconds[_UNTIMED:]
