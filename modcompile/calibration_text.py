"""The text that weights are rounded for."""

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from modcompile.corpus import builtin_documents
from modcompile.errors import DataError
from modcompile.packing import tokenize_and_pack
from modcompile.precision_config import QuantizationConfig
from modcompile.text_loss import count_predicted_tokens


def load_calibration_text(
    config: QuantizationConfig, tokenizer: PreTrainedTokenizerBase | None, model: PretrainedConfig
) -> Dataset | None:
    """Sequences of the built-in train split as `tokenize_and_pack` makes them, or None where `config` needs none.

    They lie evenly spread over the text, of which every topic is about something else. No paragraph of theirs occurs
    in the splits that models are evaluated on.

    Raises:
        DataError: the model has no tokenizer, or it makes tokens that the model does not have.
    """
    if not config.needs_calibration:
        return None
    if tokenizer is None:
        raise DataError(
            "the model has no tokenizer to make calibration text into tokens with; add its tokenizer files, or round "
            "to nearest (rtn)"
        )
    positions = getattr(model, "max_position_embeddings", config.calibration_length)
    length = min(config.calibration_length, positions)
    sequences = tokenize_and_pack(builtin_documents("train"), tokenizer, length, source="the built-in train split")
    count = min(config.calibration_samples, sequences.num_rows)
    spread = sequences.select([index * sequences.num_rows // count for index in range(count)])
    count_predicted_tokens(spread, model.vocab_size)  # refuses tokens that the model does not have
    return spread
