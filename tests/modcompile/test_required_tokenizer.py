import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from modcompile.errors import ArtifactError
from modcompile.required_tokenizer import required_tokenizer


def test_is_the_tokenizer_of_the_folder(
    routed_folder: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Names refer to objects."
    assert required_tokenizer(routed_folder)(text).input_ids == tokenizer(text).input_ids
    monkeypatch.chdir(routed_folder.parent)
    assert required_tokenizer(Path(routed_folder.name))(text).input_ids == tokenizer(text).input_ids


def test_missing_tokenizer_is_said(routed_folder: Path, tmp_path: Path) -> None:
    shutil.copy(routed_folder / "config.json", tmp_path)
    with pytest.raises(ArtifactError, match="has no tokenizer; copy that of its base model"):
        required_tokenizer(tmp_path)
