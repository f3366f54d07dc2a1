import pytest
from transformers import PreTrainedTokenizerFast

from modcompile.calibration_text import load_calibration_text
from modcompile.corpus import builtin_documents
from modcompile.errors import DataError
from modcompile.precision_config import QuantizationConfig
from tests.tiny_models import tiny_model
from tests.tiny_routed import MAX_POSITIONS, tiny_base


def test_is_spread_over_the_train_split(tokenizer: PreTrainedTokenizerFast) -> None:
    config = QuantizationConfig(calibration_samples=4, calibration_length=32)
    blocks = load_calibration_text(config, tokenizer, tiny_base().config)
    assert blocks is not None
    text = tokenizer.eos_token.join(builtin_documents("train"))
    found = [text.find(tokenizer.decode(row[2:-2])) for row in blocks["input_ids"]]
    assert [len(row) for row in blocks["input_ids"]] == [32] * 4
    assert found[0] == tokenizer.decode(blocks["input_ids"][0][:2]).__len__()
    for index, place in enumerate(found):
        assert place == pytest.approx(index * len(text) / 4, abs=0.1 * len(text))


def test_sequences_are_no_longer_than_the_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = load_calibration_text(QuantizationConfig(calibration_samples=2), tokenizer, tiny_base().config)
    assert blocks is not None
    assert [len(row) for row in blocks["input_ids"]] == [MAX_POSITIONS] * 2


@pytest.mark.parametrize("config", [QuantizationConfig(method="rtn"), QuantizationConfig(precisions=[16])])
def test_is_not_made_where_nothing_is_rounded_for_it(config: QuantizationConfig) -> None:
    assert load_calibration_text(config, None, tiny_base().config) is None


def test_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"no tokenizer.*or round to nearest"):
        load_calibration_text(QuantizationConfig(), None, tiny_base().config)


def test_refuses_the_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="but the model has 96"):
        load_calibration_text(QuantizationConfig(), tokenizer, tiny_model("llama").config)
