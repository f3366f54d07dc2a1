"""What overrides the routing of an artifact: thresholds of depth gates, a bias on the choice of precisions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modcompile.config import check_threshold
from modcompile.errors import ConfigError

THRESHOLD_INPUT, BIAS_INPUT = "routing_threshold", "precision_bias"


class Overrides:
    """Thresholds and a bias for the optional inputs of an artifact, `shapes` by name.

    `num_thresholds` is the number of depth gates, `bias_shape` the number of layers that choose a
    precision, and of precisions.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.num_thresholds = int(shapes[THRESHOLD_INPUT][0]) if THRESHOLD_INPUT in shapes else 0
        self.bias_shape = tuple(map(int, shapes[BIAS_INPUT])) if BIAS_INPUT in shapes else (0, 0)
        self.overriding: Mapping[str, NDArray[Any]] = {}
        """What is fed, by the input's name; another mapping whenever something was set."""
        self._thresholds: tuple[float, ...] | None = None

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """What overrides the thresholds of the artifact, one a gate; None leaves them as they are.

        One number may be assigned for all gates.

        Raises:
            ConfigError: a threshold is negative, infinite or not a number, or there are not as many as gates.
        """
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: float | Sequence[float] | None) -> None:
        if values is None:
            self._thresholds = None
        else:
            given = list(values) if isinstance(values, Sequence) else [values] * self.num_thresholds
            if len(given) != self.num_thresholds:
                raise ConfigError(f"{len(given)} thresholds for {self.num_thresholds} gates; give one, or one each")
            self._thresholds = tuple(map(check_threshold, given))
        self._override(THRESHOLD_INPUT, self._thresholds or None)

    def set_precision_bias(self, bias: Any) -> None:
        """What is added to the logits of the routers of precisions, `bias_shape` or broadcast to it; None: as stored.

        Raises:
            ConfigError: it has another shape, or holds NaN, or the artifact does not choose precisions.
        """
        if bias is None:
            self._override(BIAS_INPUT, None)
            return
        if not all(self.bias_shape):
            raise ConfigError("a precision bias for an artifact that does not choose precisions; leave it out")
        try:
            given = np.broadcast_to(np.asarray(bias, np.float32), self.bias_shape)
        except ValueError as error:
            raise ConfigError(f"a precision bias must be numbers of shape {self.bias_shape} ({error})") from error
        if np.isnan(given).any():
            raise ConfigError("a precision bias holds NaN; give numbers, or infinity to force a precision")
        self._override(BIAS_INPUT, given)

    def _override(self, name: str, values: Any) -> None:
        kept = {other: value for other, value in self.overriding.items() if other != name}
        self.overriding = kept if values is None else kept | {name: np.array(values, np.float32)}
