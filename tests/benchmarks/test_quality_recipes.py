import shlex
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.recipes import ORIGINAL, ROUTED, STATIC, Recipe, recipes
from benchmarks.quality.texts import named_text, standard_texts, windows
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.flags import parse_flags
from modcompile.loss_config import LossConfig
from modcompile.start_config import StartConfig
from modcompile.training_arguments import RouterTrainingArguments

_CONFIGS = (RouterConfig, BudgetConfig, LossConfig, StartConfig, RouterTrainingArguments)


def _parsed(recipe: Recipe) -> dict[str, object]:
    flags = shlex.split(recipe.flags)
    at = flags.index("--sequence_length")
    parsed = parse_flags("train", "", None, _CONFIGS, [*flags[:at], *flags[at + 2 :]])
    return {name: value for config in parsed for name, value in vars(config).items()}


def test_static_selections_have_the_adapters_and_the_training_of_the_routers() -> None:
    routed, *others = recipes([0.9, 0.8])
    static = [recipe for recipe in others if recipe.way == STATIC]
    assert (routed.way, routed.work) == (ROUTED, None)
    assert [recipe.work for recipe in static] == [0.9, 0.8]
    ours = _parsed(routed)
    adapters = ("granularity", "skip_adapter", "adapter_rank")
    same = (*adapters, "learning_rate", "lr_scheduler_type", "distill_weight", "bf16")
    for recipe in static:
        theirs = _parsed(recipe)
        assert theirs["target_active_ratio"] == recipe.work
        assert {name: theirs[name] for name in same} == {name: ours[name] for name in same}


def test_the_original_has_soft_gates_and_no_adapters() -> None:
    (original,) = [recipe for recipe in recipes([0.9]) if recipe.way == ORIGINAL]
    parsed = _parsed(original)
    assert (parsed["gate"], parsed["skip_adapter"], parsed["distill_weight"]) == ("soft", "none", 0)
    assert parsed["target_active_ratio"] == original.work == 0.8


def test_each_has_a_folder_of_its_own() -> None:
    folders = [recipe.folder for recipe in recipes([0.95, 0.9, 0.8, 0.7])]
    assert len(set(folders)) == len(folders) == 6
    assert all(Path(folder).name == folder for folder in folders)


def test_windows_are_whole_and_spread_over_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = standard_texts()
    assert set(texts) == {"prose", "code", "dialogue"}
    for text in texts.values():
        found = windows(text, tokenizer, 64, 3)
        assert [len(row["input_ids"]) for row in found] == [64] * 3
        assert all(sum(row["attention_mask"]) == 64 for row in found)
    whole, few = windows(texts["code"], tokenizer, 64, 10**6), windows(texts["code"], tokenizer, 64, 2)
    assert few[0]["input_ids"] == whole[0]["input_ids"]
    assert few[1]["input_ids"] == whole[whole.num_rows // 2]["input_ids"]
    with pytest.raises(ValueError, match="shorter than 64 tokens"):
        windows("a few words", tokenizer, 64, 3)


def test_a_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("some words")
    assert named_text(f"mine={tmp_path / 'a=b.txt'}") == ("mine", "some words")
    for wrong in ("mine", "=path", "mine="):
        with pytest.raises(ValueError, match="is not of the form NAME=PATH"):
            named_text(wrong)
