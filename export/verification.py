"""What a verification found, and whether that is within bounds."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx
import onnxruntime as ort
import torch
import transformers

from modcompile.version import __version__

MAX_LOGIT_DIFFERENCE = 1e-3
MIN_EQUAL_ROUTES = 0.999
MAX_PERPLEXITY_CHANGE = 0.005
MAX_FORCED_CHANGE = 0.05
"""Of the perplexity where decisions are forced: of so few tokens, rounding activations alone makes 1 %."""
NUM_STANDARD_ERRORS = 3.0
"""By how many of them it may change besides where there are gates, which a rounding that falls the other way may turn.

In trained SmolLM2, rounding alike turned 1 % of the gates at int8 and 0.4 % at int4, for a standard error of 0.8 % and
0.6 % on the texts of a verification.
"""
MAX_NOISE = 0.03
"""At most so much, however few and unlike the tokens are."""
MAX_ERROR_RATIO = 4.0
"""Where logits differ by more, how much further from float64 than PyTorch's the artifact's may be."""
NOT_VERIFIED = "not verified: nobody has compared what this model computes with what PyTorch does"


def versions() -> dict[str, str]:
    """The versions that a result was obtained with."""
    return {
        "modcompile": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
    }


@dataclass
class Verification:
    """What was compared, and how it came out; `passed` says whether all of it is within bounds."""

    skipped: bool = False
    """Nothing was compared, as was asked for."""
    max_logit_difference: float = 0.0
    equal_routes: float = 1.0
    compared_routes: int = 0
    compared_tokens: int = 0
    perplexity_torch: float = math.nan
    perplexity_onnx: float = math.nan
    active_ratio: float = math.nan
    average_bits: float = math.nan
    """Of models that choose precisions; a skipped block has 0."""
    perplexity_rounded: dict[str, float] = field(default_factory=dict)
    """Of models with quantized weights: with activations rounded to 8 bits, in both runtimes, on longer texts."""
    perplexity_noise: float = 0.0
    """Where there are gates, the standard error of the ratio of the two, by the differences of the tokens' losses."""
    perplexity_unrounded: float | None = None
    """The same in PyTorch, of float activations and the weights as they were before the export rounded them."""
    perplexities_forced: dict[str, dict[str, float]] = field(default_factory=dict)
    """The same of fewer texts, by the case that decides in the place of the routers."""
    never_seen: dict[int, list[str]] = field(default_factory=dict)
    """By layer, which of its branches no case has shown."""
    cases: dict[str, float] = field(default_factory=dict)
    errors_to_double: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the cases in which logits differ by more than the bound: the errors of both runtimes against float64."""
    bounds: dict[str, float] = field(
        default_factory=lambda: {
            "max_logit_difference": MAX_LOGIT_DIFFERENCE,
            "or_error_to_double_relative_to_torch": MAX_ERROR_RATIO,
            "equal_routes": MIN_EQUAL_ROUTES,
            "perplexity_change": MAX_PERPLEXITY_CHANGE,
            "and_standard_errors": NUM_STANDARD_ERRORS,
            "and_at_most": MAX_NOISE,
            "forced_perplexity_change": MAX_FORCED_CHANGE,
        }
    )
    versions: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether it was compared, and nothing failed."""
        return not self.failures and not self.skipped

    def as_json(self) -> dict[str, Any]:
        """What `verification.json` holds."""
        if self.skipped:
            return {"passed": False, "skipped": True, "result": NOT_VERIFIED, "versions": self.versions}
        return {"passed": self.passed, **asdict(self)}

    @property
    def cases_out_of_bounds(self) -> list[str]:
        """The cases in which logits differ by more than the bound."""
        return [name for name, difference in self.cases.items() if not difference <= MAX_LOGIT_DIFFERENCE]

    def _is_rounding(self, case: str) -> bool:
        errors = self.errors_to_double.get(case)
        return errors is not None and errors["onnx"] <= MAX_ERROR_RATIO * errors["torch"]

    def judge(self) -> None:
        """Add a failure, one line each, for everything that is out of bounds."""
        wrong = [name for name in self.cases_out_of_bounds if not self._is_rounding(name)]
        if wrong:
            worst = max(wrong, key=lambda name: math.inf if math.isnan(self.cases[name]) else self.cases[name])
            difference = f"{self.cases[worst]:.2g}"
            self.failures.append(f"logits differ by {difference}, more than {MAX_LOGIT_DIFFERENCE:g} ({worst})")
        if not self.equal_routes >= MIN_EQUAL_ROUTES:
            share = f"{self.equal_routes:.4%}"
            self.failures.append(f"only {share} of the routes are equal, less than {MIN_EQUAL_ROUTES:.1%}")
        if self.perplexity_rounded:
            bound = MAX_PERPLEXITY_CHANGE + min(NUM_STANDARD_ERRORS * self.perplexity_noise, MAX_NOISE)
            self._judge_perplexity(self.perplexity_rounded, bound, "own decisions, row by row")
        for case, forced in self.perplexities_forced.items():
            self._judge_perplexity(forced, MAX_FORCED_CHANGE, case)
        for name, layers in self._layers_by_missing_branch().items():
            self.failures.append(f"the If of layer {layers[0]} was never seen {name}")

    def _judge_perplexity(self, by_runtime: dict[str, float], bound: float, case: str) -> None:
        change = abs(by_runtime["onnx"] / by_runtime["torch"] - 1)
        if not change <= bound:
            self.failures.append(f"the perplexity differs by {change:.2%}, more than {bound:.1%} ({case})")

    def _layers_by_missing_branch(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for layer, names in sorted(self.never_seen.items()):
            for name in names:
                found.setdefault(name, []).append(layer)
        return found
