"""How fast an exported folder decodes at the points of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np

from modcompile.errors import ArtifactError, ConfigError, DataError

_ROUNDS = 3
_TOKENS, _UNTIMED = 64, 3


class SweepSpeed:
    """A session on `folder/onnx`, which must have all of a model's gates; with a thread for every core.

    Of each of the `texts`, the second half of its first 64 tokens is decoded, as a model skips more in what it repeats
    by itself.

    Raises:
        ArtifactError: the folder has no artifact, or ONNX Runtime can't load it.
        ConfigError: there is no ONNX Runtime; or gates are folded.
        DataError: no text is long enough to decode some of it.
    """

    def __init__(self, folder: Path, gates: int, texts: Sequence[Sequence[int]]) -> None:
        self._texts = [text[:_TOKENS] for text in texts if len(text) > 2 * _UNTIMED]
        if not self._texts:
            raise DataError(f"--sweep_speed decodes a text, and none has more than {2 * _UNTIMED} tokens; give more")
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

    def measure(self, thresholds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[float]]:
        """Tokens a second of one row, at the thresholds of each point of each way, by its name.

        The points take turns. As steps differ in what they skip, the mean of all counts, each by its median of the
        rounds.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        times: dict[str, list[list[list[float]]]] = {way: [[] for _ in points] for way, points in thresholds.items()}
        for _ in range(_ROUNDS):
            for way, points in thresholds.items():
                for rounds, point in zip(times[way], points, strict=True):
                    rounds.append([step for text in self._texts for step in self._seconds(point, text)])
        return {way: [1 / float(np.median(rounds, 0).mean()) for rounds in points] for way, points in times.items()}

    def _seconds(self, thresholds: Sequence[float], text: Sequence[int]) -> list[float]:
        # Only here, as above.
        from modcompile.export.decoder import Decoder

        self._session.thresholds = list(thresholds)
        half = len(text) // 2
        decoder = Decoder(self._session, 1, len(text))
        decoder.step(np.array([text[:half]]))
        seconds = []
        for token in text[half:]:
            start = perf_counter()
            decoder.step(np.array([[token]]))
            seconds.append(perf_counter() - start)
        return seconds[_UNTIMED:]
