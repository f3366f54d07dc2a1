"""What a verification asks of the kind of model that was exported."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import onnx_ir as ir

from modcompile.export.session import RoutedSession
from modcompile.export.step_binding import Array
from modcompile.export.verification import Verification
from modcompile.export.verification_inputs import Case


class Subject(Protocol):
    """A model in PyTorch, and how its routes are forced, read and told in both runtimes.

    A route is what was decided for a token in a routed layer: executed or not, or a number of bits.
    """

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The output of the model for ids, mask, positions and cache."""

    @property
    def branches(self) -> Mapping[int, Sequence[str]]:
        """For each routed layer, in order, the names of the branches that can be taken."""

    def stored(self, case: Case) -> Mapping[str, Array]:
        """The initializers that an artifact must hold which was exported as the case is."""

    def force(self, session: RoutedSession, case: Case) -> None:
        """Let both runtimes decide as the case says."""

    def restore(self) -> None:
        """Let the model decide as it did before."""

    def tell(self, model: ir.Model) -> None:
        """Add outputs to an ONNX model that tell what was done, and make it comparable with PyTorch."""

    def torch_routes(self, output: Any) -> Array:
        """From the output of a call: `[R, B, T]`."""

    def onnx_routes(self, told: Mapping[str, Array], ids: Array) -> tuple[Array, list[int]]:
        """From what the graph that tells returned, by name: `[R, B, T]`, and the branch that each layer took."""

    def measure_shipped(self, shipped: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        """Run the artifact as it is, before the graph that tells: a session at a time."""

    def compare_shipped(self, telling: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
        """Compare what was measured with the graph that tells, or with PyTorch."""

    def arbitrate(self, session: RoutedSession, cases: Sequence[Case]) -> dict[str, dict[str, float]]:
        """For cases out of bounds, the errors of both runtimes against a better reference, if there is one."""

    def usage(self, routes: Array, tokens: Array) -> float:
        """What was spent on the tokens `[B, T]` in all layers, summed: executed blocks, or bits."""

    def record(self, result: Verification, spent: float) -> None:
        """Keep what was spent, the mean over tokens and layers."""
