"""Where the text comes from: the data sets that the options name."""

from datasets import Dataset, DatasetDict, Value

from modcompile.corpus import BUILTIN, builtin_documents
from modcompile.data_config import DataConfig
from modcompile.errors import ConfigError, DataError
from modcompile.text_sources import load_named_dataset, load_text_dataset


def load_texts(config: DataConfig) -> DatasetDict:
    """The texts of a split `train` and, where the source has one, of a split `validation`, in a column `text`.

    The column is that of the name `text`, else the first one that holds strings; rows without a text are None.

    Raises:
        ConfigError: neither a data set nor a training file is given.
        DataError: the data can't be found or read, have no training split or no texts, or only blank ones.
    """
    if config.source is None:
        raise ConfigError(f"no data: give --dataset_name (`{BUILTIN}` needs no network) or --train_file")
    if config.dataset_name == BUILTIN:
        splits = DatasetDict(
            train=Dataset.from_dict({"text": builtin_documents("train")}),
            validation=Dataset.from_dict({"text": builtin_documents("validation")}),
        )
    elif config.dataset_name is not None:
        splits = load_named_dataset(config.dataset_name, config.dataset_config_name)
    else:
        files = {"train": config.train_file, "validation": config.validation_file}
        splits = DatasetDict({split: load_text_dataset(file) for split, file in files.items() if file is not None})
    if "train" not in splits:
        raise DataError(f"{config.source} has no split `train`, only: {', '.join(splits)}")
    return DatasetDict(
        {
            split: _text_column(splits[split], f"the split `{split}` of {config.source}")
            for split in ("train", "validation")
            if split in splits
        }
    )


def _text_column(dataset: Dataset, where: str) -> Dataset:
    if not dataset.num_rows:
        raise DataError(f"{where} is empty")
    columns = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    ]
    if not columns:
        raise DataError(f"{where} has no column of texts; its columns are: {', '.join(dataset.column_names)}")
    column = "text" if "text" in columns else columns[0]
    texts = dataset.select_columns([column])
    if column != "text":
        texts = texts.rename_column(column, "text")
    if not any(text and not text.isspace() for text in texts["text"]):
        raise DataError(f"{where} has only blank texts in its column `{column}`")
    return texts
