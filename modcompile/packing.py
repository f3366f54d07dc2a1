"""From texts to blocks of tokens of one length."""

from array import array
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modcompile.config import check
from modcompile.data import load_texts
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError

_IGNORED = -100  # the label that transformers' losses leave out
_ROWS_AT_ONCE = 256

Tokens = NDArray[np.int32]


def load_blocks(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_positions: int | None = None
) -> DatasetDict:
    """The splits `train` and `validation` of the configured data, packed as `tokenize_and_pack` does.

    Without a validation split, the first tokens of train become one: the configured percentage in whole sequences, at
    least one sequence, but never more than half of train. Nothing here is random.

    Raises:
        ConfigError: no data are given, or `config.sequence_length` is above `max_positions`.
        DataError: see `load_texts`; or a split is shorter than two tokens.
    """
    length = config.sequence_length
    _check_length(length, max_positions)
    texts = load_texts(config)
    train = _tokenize(texts["train"]["text"], tokenizer, "train")
    if "validation" in texts:
        validation = _tokenize(texts["validation"]["text"], tokenizer, "validation")
    else:
        validation, train = _hold_out(train, config)
    limits = {"train": config.max_train_samples, "validation": config.max_eval_samples}
    blocks = DatasetDict()
    for split, tokens in (("train", train), ("validation", validation)):
        packed = _pack(tokens, tokenizer, length, f"the split `{split}` of {config.source}")
        blocks[split] = packed.select(range(min(limits[split] or packed.num_rows, packed.num_rows)))
    return blocks


def tokenize_and_pack(
    texts: Sequence[str | None],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    *,
    max_positions: int | None = None,
    source: str = "the text",
) -> Dataset:
    """All texts in one run of tokens, cut into blocks: `input_ids`, `attention_mask` and `labels`, `[sequence_length]`.

    Documents are parted by the tokenizer's EOS, and start with its BOS if it puts one itself. A text that ends in a
    line break is a line of a document: the next text continues it. Texts that are None or empty are left out. The last
    block may be short: it is padded on the right (mask 0, labels -100), or dropped if it has only one token.

    `source` names the texts in errors and in the progress bar.

    Raises:
        ConfigError: `sequence_length` is below 2 or above `max_positions`, the model's `max_position_embeddings`.
        DataError: the texts have fewer than two tokens in all.
    """
    _check_length(sequence_length, max_positions)
    return _pack(_tokenize(texts, tokenizer, source), tokenizer, sequence_length, source)


def _hold_out(tokens: Tokens, config: DataConfig) -> tuple[Tokens, Tokens]:
    """Validation and train, cut from one run of tokens."""
    if 2 <= len(tokens) < 4:
        raise DataError(f"{config.source} has fewer than four tokens, too few to train on and to hold some out")
    share = int(len(tokens) * config.validation_split_percentage / 100)
    sequences = max(share // config.sequence_length, 1)
    held_out = min(sequences * config.sequence_length, len(tokens) // 2)
    return tokens[:held_out], tokens[held_out:]


def _check_length(sequence_length: int, max_positions: int | None) -> None:
    check("sequence_length", sequence_length, at_least=2)
    if max_positions is not None and sequence_length > max_positions:
        raise ConfigError(f"--sequence_length {sequence_length} is above the {max_positions} positions of the model")


def _tokenize(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, source: str) -> Tokens:
    start, separator = _document_marks(tokenizer)
    tokens = array("i")
    in_document = False
    with tqdm(total=len(texts), desc=f"Tokenizing {source}", unit="text", delay=2, leave=False) as bar:
        for first in range(0, len(texts), _ROWS_AT_ONCE):
            rows = [text for text in texts[first : first + _ROWS_AT_ONCE] if text]
            # verbose=False: a text longer than the model's positions is no reason to warn, it is cut into blocks.
            encoded = tokenizer(rows, add_special_tokens=False, verbose=False)["input_ids"] if rows else []
            for text, ids in zip(rows, encoded, strict=True):
                if not in_document:
                    tokens.extend(separator + start if tokens else start)
                tokens.extend(ids)
                in_document = text.endswith("\n")
            bar.update(min(_ROWS_AT_ONCE, len(texts) - first))
    return np.frombuffer(tokens, dtype=np.int32)


def _document_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens at the start of every document, and those between two of them."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    # Where one token is both (OPT), once is enough.
    return start, [] if eos is None or start == [eos] else [eos]


def _pack(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, sequence_length: int, source: str) -> Dataset:
    if len(tokens) < 2:
        raise DataError(f"{source} has fewer than two tokens: give more text")
    rest = len(tokens) % sequence_length
    kept = len(tokens) - rest if rest < 2 else len(tokens)
    shape = (-(-kept // sequence_length), sequence_length)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = np.full(shape, padding, dtype=np.int32)
    input_ids.reshape(-1)[:kept] = tokens[:kept]
    attention_mask = (np.arange(input_ids.size) < kept).reshape(shape)
    labels = np.where(attention_mask, input_ids, np.int32(_IGNORED))
    columns = {"input_ids": input_ids, "attention_mask": attention_mask.astype(np.int8), "labels": labels}
    return Dataset.from_dict(columns)
