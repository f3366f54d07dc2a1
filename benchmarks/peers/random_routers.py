"""python -m benchmarks.peers.random_routers SOURCE --output_dir DIR --skipped SHARE: routers that skip at random.

A routed folder whose routers are linear and random, with biases at which each closes for that share of the tokens of
held-out text: for each token other layers, as trained routers do, so that no layer of a prompt can be left out whole.
What trained routers skip costs the same; what it does to the text is another question.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.peers.source import Source
from modcompile.artifacts import write_routed_folder
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_base, load_tokenizer
from modcompile.config import RouterConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.routed_graph import build_routed

_TOKENS = 512


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--model", required=True, help="the source's name, as for benchmarks.peers")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--skipped", type=float, required=True, help="in (0, 1)")
    args = parser.parse_args()
    found = find_checkpoint(str(args.source))
    model = build_routed(load_base(found).float(), RouterConfig(router_hidden_size=0))
    tokens = Source(args.model, args.source, None).tokens(_TOKENS)
    print(f"{randomize(model, tokens, args.skipped):.3f} of the gates are closed")
    write_routed_folder(model, load_tokenizer(found), args.output_dir)


@torch.no_grad()
def randomize(model: RoutedForCausalLM, tokens: list[int], skipped: float) -> float:
    """Draw the linear routers of a soft model, and close each for a share of the tokens; returns the share reached."""
    torch.manual_seed(0)
    hooks = []
    routers: list[Any] = list(model.routers.values())
    for router in routers:
        nn.init.normal_(router.score.down.weight)
        hooks.append(router.register_forward_pre_hook(partial(_set_bias, skipped=skipped)))
    gates = model(torch.tensor([tokens]), use_cache=False).gates
    for hook in hooks:
        hook.remove()
    return float((torch.stack(list(gates)) < 0.5).float().mean())


def _set_bias(router: nn.Module, inputs: tuple[torch.Tensor, ...], *, skipped: float) -> None:
    # Before it is executed, on what the routers before it have left.
    typed: Any = router
    typed.bias.fill_(-float(typed.score(inputs[0]).quantile(skipped)))


if __name__ == "__main__":
    main()
