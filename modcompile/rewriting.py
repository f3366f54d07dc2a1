"""Make a routed folder of a base model."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modcompile.artifacts import has_trained_routers, is_routed_folder, update_report, write_routed_folder
from modcompile.config import AUTO_LAYERS, RouterConfig
from modcompile.errors import OutputError, UnsupportedModelError
from modcompile.granularity import layer_of
from modcompile.modeling import RoutedForCausalLM
from modcompile.output_folder import check_writable_target
from modcompile.progress import show_elapsed
from modcompile.routed_graph import build_routed
from modcompile.share_of_parameters import describe_share, share_of_parameters
from modcompile.stages import stage

_NUM_TOKENS = 12


def check_routed_target(output: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, to replace what is not ours, or routers that took time to train.

    Raises:
        OutputError: `output` can't be written or must not be.
    """
    check_trainable(output, overwrite=overwrite)
    check_writable_target(output, overwrite=overwrite, is_ours=is_routed_folder)


def check_trainable(folder: Path, *, overwrite: bool) -> None:
    """Refuse, before any work, to train in place of routers that took time to train.

    Raises:
        OutputError: there are such routers in `folder`.
    """
    if has_trained_routers(folder) and not overwrite:
        raise OutputError(f"{folder} holds trained routers; choose another --output_dir or pass --overwrite_output_dir")


def write_rewritten(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: RouterConfig,
    output: Path,
    *,
    overwrite: bool,
) -> RoutedForCausalLM:
    """Write the routed folder of a base model, with new routers, say what it is, and return what was written.

    Raises:
        UnsupportedModelError: the model can't be routed.
        ConfigError: `config` selects none of its layers.
        DataError: layers are to be chosen on a text, and there is no tokenizer.
        OutputError: `output` can't be written or must not be.
    """
    if config.router_layers == AUTO_LAYERS:
        # Only here: what reads a text takes a second to import.
        from modcompile.proposed_layers import with_proposed_layers

        config = with_proposed_layers(config, base, tokenizer)
    model, difference = rewrite_model(base, config)
    write_routed_folder(model, tokenizer, output, overwrite=overwrite)
    report = {
        "model": base.config.name_or_path,
        "routed_layers": list(model.routed_layers),
        "parameters": share_of_parameters(model),
        "logit_difference_to_dense": difference,
    }
    update_report(output, "rewrite", report)
    print(describe(model))
    print(
        f"wrote {output}, untrained: run hard it is the dense model, soft its logits differ by at most "
        f"{difference['soft']:.2g}"
    )
    return model


@stage("comparing with the dense model")
def rewrite_model(base: PreTrainedModel, config: RouterConfig) -> tuple[RoutedForCausalLM, dict[str, float]]:
    """The routed model of `base` and how far its logits are from those of `base`, untrained: hard and soft.

    Hard, the difference must be 0.

    Raises:
        ConfigError: `config` selects no layer of this model.
        UnsupportedModelError: the model can't be routed, or its rewritten graph does not compute what it computes.
    """
    with show_elapsed("rewriting"):
        model = build_routed(base, config)
        input_ids = torch.arange(2 * _NUM_TOKENS, device=base.device).view(2, -1) * 7919 % base.config.vocab_size
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :3] = 0
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        difference = {}
        with torch.no_grad():
            expected = base(**inputs).logits
            for name, threshold in (("hard", 0.5), ("soft", None)):
                model.set_router_mode(threshold)
                difference[name] = float((model(**inputs).logits - expected)[attention_mask == 1].abs().max())
    if difference["hard"] != 0:
        raise UnsupportedModelError(
            f"the rewritten graph of {type(base).__name__} differs from the model by {difference['hard']:.2g}, though "
            "all its gates are open; its layers are not alike, or depend on what a trace does not record"
        )
    model.reset_usage()
    return model, difference


def describe(model: RoutedForCausalLM) -> str:
    """One line: what is routed, and how small the routers are."""
    gates = len(model.gated_layers)
    layers = len({layer_of(layer, model.router_config.granularity) for layer in model.routed_layers})
    shared = f" with {gates} gates" if gates != layers else ""
    return f"{type(model.base).__name__}, {layers} routed layers{shared}; {describe_share(model)}"
