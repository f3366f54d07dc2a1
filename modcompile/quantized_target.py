"""Where a quantized folder may be written: not over the model that it is made of, nor over trained routers."""

from pathlib import Path

from modcompile.checkpoint_sources import CheckpointSource
from modcompile.errors import OutputError
from modcompile.output_folder import check_writable_target
from modcompile.precision_router_files import has_precision_routers
from modcompile.quantized_folder import is_quantized_folder
from modcompile.training_checkpoints import training_checkpoints


def check_quantized_target(output: Path, source: CheckpointSource, *, in_place: bool, overwrite: bool) -> None:
    """Refuse, before any work, to replace what is not ours, the source, or routers that took time to train.

    With `in_place` the source is itself a quantized folder, whose routers alone are replaced if it is the output.

    Raises:
        OutputError: `output` can't be written or must not be.
    """
    # What comes from a hub is kept in the hub's cache, whatever is called as the model is.
    model = None if source.kind == "hub" else Path(source.location).resolve() / (source.gguf_file or "")
    if model is None or output.resolve() != model:
        target = check_writable_target(output, overwrite=overwrite, is_ours=is_quantized_folder)
        if model is not None and target in (model, *model.parents):
            raise OutputError(f"{output} is or holds {source}, which is kept; choose another --output_dir")
    elif not in_place:
        raise OutputError(f"{output} is the model that is quantized, which is kept; choose another --output_dir")
    if (has_precision_routers(output) or training_checkpoints(output)) and not overwrite:
        raise OutputError(f"{output} holds trained routers; choose another --output_dir or pass --overwrite_output_dir")
