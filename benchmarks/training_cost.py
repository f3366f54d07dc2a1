"""python -m benchmarks.training_cost: what a training step of the routers of precisions costs in PyTorch.

Quantizes a model (rounding to nearest: speed does not depend on the rounding) to 2, 4 and 8 bits, and times, in turn,
forward and backward passes of a batch: of the plain model with its weights frozen and the gradient carried down to the
embeddings, as any training of routers in all layers must; and of the rewritten graph in each way of mixing. Writes
training_cost.json and .md, or training_cost_SHAPE.json and .md, into benchmarks/results.
"""

import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.cost_arguments import make_base, model_arguments, model_name, results_name
from modcompile.export.verification import versions
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_config import PrecisionRouterConfig, QuantizationConfig
from modcompile.quantizing import quantize_base

_RESULTS = Path(__file__).parent / "results"
_PRECISIONS = [2, 4, 8]
_FORWARD, _PLAIN = "plain model, forward alone", "plain model"
Step = Callable[[], object]


def main() -> None:
    """Measure, print, and write the results."""
    parser = model_arguments(__doc__)
    parser.add_argument("--batch_size", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--sequence_length", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind (default: %(default)s)")
    args = parser.parse_args()

    base = make_base(args)
    ids = torch.randint(0, 1000, (args.batch_size, args.sequence_length), generator=torch.Generator().manual_seed(0))
    seconds = time_in_turn(steps(base, ids), args.rounds)
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "arguments": vars(args),
        "model": model_name(args),
        "seconds": seconds,
    }
    _RESULTS.mkdir(exist_ok=True)
    name = results_name("training_cost", args)
    (_RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = table(result)
    (_RESULTS / f"{name}.md").write_text(text)
    print(text)


def steps(base: PreTrainedModel, ids: torch.Tensor) -> dict[str, Step]:
    """What is timed, by its name."""
    plain: Any = base.requires_grad_(requires_grad=False)
    found: dict[str, Step] = {
        _FORWARD: partial(_forward, plain, ids),
        _PLAIN: partial(_plain_step, plain, ids),
    }
    checkpoint = quantize_base(base, QuantizationConfig(precisions=_PRECISIONS, method="rtn"))
    for scope in ("sequence", "token"):
        for mixing in ("soft", "sampled"):
            config = PrecisionRouterConfig(router_scope=scope, precision_mixing=mixing)
            model = LayerwiseQuantizeForCausalLM(checkpoint, config).train()
            found[f"{mixing}, routers of {scope}s"] = partial(_router_step, model, ids)
    return found


def _forward(plain: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        plain(ids)


def _plain_step(plain: Any, ids: torch.Tensor) -> None:
    embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
    plain(inputs_embeds=embedded, labels=ids).loss.backward()


def _router_step(model: LayerwiseQuantizeForCausalLM, ids: torch.Tensor) -> None:
    loss = model.train_forward(ids, torch.ones_like(ids), labels=ids).loss
    assert loss is not None
    loss.backward()


def time_in_turn(kinds: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, `rounds` times, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds + 1):
        for name, step in kinds.items():
            start = perf_counter()
            step()
            seconds[name].append(perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| step | seconds | spread | against the plain model |", "|---|---|---|---|"]
    for name, taken in result["seconds"].items():
        lower, median, upper = statistics.quantiles(taken, n=4)
        ratio = statistics.median(mine / plain for mine, plain in zip(taken, result["seconds"][_PLAIN], strict=True))
        lines.append(f"| {name} | {median:.2f} | {(upper - lower) / median:.0%} | {ratio:.2f} x |")
    arguments = result["arguments"]
    lines += [
        "",
        f"- {result['model']}, {', '.join(map(str, _PRECISIONS))} bits, routers in all layers.",
        f"- {arguments['batch_size']} sequences of {arguments['sequence_length']} tokens.",
        f"- {result['machine']['threads']} threads, PyTorch {result['versions']['torch']}.",
        f"- Forward and backward, {arguments['rounds']} times in turn; medians; spread is the middle half.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
