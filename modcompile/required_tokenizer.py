"""The tokenizer of a folder, for what can't do without."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_tokenizer
from modcompile.errors import ArtifactError


def required_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`.

    Raises:
        ArtifactError: there is none.
        CheckpointError: its files are damaged.
    """
    tokenizer = load_tokenizer(find_checkpoint(str(folder.resolve())))
    if tokenizer is None:
        raise ArtifactError(
            f"{folder} has no tokenizer; copy that of its base model there (tokenizer.json, tokenizer_config.json)"
        )
    return tokenizer
