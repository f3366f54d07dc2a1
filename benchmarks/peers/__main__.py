"""python -m benchmarks.peers: our exports beside onnxruntime-genai, llama.cpp and PyTorch, on the same weights.

Makes everyone's model from one folder of weights, then measures all in turn, each time in a fresh process: prefilling,
decoding, and memory; and what their 4 bits do to the perplexity of held-out text. Peers live in an environment of
their own (`make bench-peers`); who is missing there is left out. Writes peers_MODEL.json, .md and .png into
benchmarks/results.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.peers.comparison import compare
from benchmarks.peers.plot import plot
from benchmarks.peers.report import report
from benchmarks.peers.source import MODELS


def main() -> None:
    """Measure, print, and write the results."""
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(args, Path(args.work_dir or temporary).absolute() / args.model)
    results = Path(__file__).parents[1] / "results"
    results.mkdir(exist_ok=True)
    name = f"peers_{args.model}{args.suffix}"  # which may hold a dot
    text = report(result)
    (results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (results / f"{name}.md").write_text(text)
    plot(result, results / f"{name}.png")
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def count(name: str, default: int, what: str) -> None:
        parser.add_argument(name, type=int, default=default, help=f"{what} (default: %(default)s)")

    parser.add_argument("--model", choices=MODELS, default="smollm2", help="(default: %(default)s)")
    parser.add_argument("--peers", default=".peers", help="the environment of the peers (default: %(default)s)")
    count("--threads", 2, "of everyone")
    count("--prompt_tokens", 64, "of the prompt that is decoded from")
    count("--long_prompt_tokens", 512, "of the other one")
    count("--new_tokens", 64, "decoded after the prompt")
    count("--context_tokens", 4096, "of the context that is decoded after as well, cut to the model's positions")
    count("--context_new_tokens", 16, "decoded after it")
    count("--rounds", 8, "processes for every case")
    count("--repeats", 3, "repeats in a process")
    count("--windows", 32, "sequences of 512 tokens that perplexity is measured on")
    parser.add_argument("--only", help="measure only the cases whose names hold this text")
    parser.add_argument("--suffix", default="", help="of the names of the results: of another machine, say")
    parser.add_argument("--work_dir", help="keep the models that are made here, and use them in a later run")
    return parser


if __name__ == "__main__":
    main()
