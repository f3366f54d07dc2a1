"""How small the trained part of a model is."""

from torch import nn


def share_of_parameters(model: nn.Module) -> dict[str, float]:
    """How many parameters are trained, how many are not, and the first as a share of all."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return {"trainable": counts[True], "base": counts[False], "trainable_share": counts[True] / sum(counts.values())}


def describe_share(model: nn.Module) -> str:
    """The same for a person."""
    numbers = share_of_parameters(model)
    return (
        f"trainable: {numbers['trainable']:,} of {numbers['trainable'] + numbers['base']:,} parameters "
        f"({numbers['trainable_share']:.3%})"
    )
