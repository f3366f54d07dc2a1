"""Where the text comes from: the options, and the data sets they name."""

from dataclasses import dataclass, field

from datasets import Dataset, DatasetDict, Value

from modcompile.config import check
from modcompile.corpus import BUILTIN, builtin_documents
from modcompile.errors import ConfigError, DataError
from modcompile.text_sources import load_named_dataset, load_text_dataset


@dataclass(frozen=True)
class DataConfig:
    """The options of the data. A text is a row of a data set, a line of a text file, a record of a JSON file.

    Raises:
        ConfigError: a value is out of its range, or two options contradict each other.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data set: a name on the Hugging Face hub, a local folder of data files, or `builtin`, English "
            "prose that comes with Python and needs no network."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset_name, where the data set has several."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Text to train on, instead of --dataset_name: a .txt, .json or .jsonl file."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Text to evaluate on beside --train_file: a .txt, .json or .jsonl file."}
    )
    sequence_length: int = field(
        default=512, metadata={"help": "Tokens in a training sequence; at most the positions of the model."}
    )
    validation_split_percentage: float = field(
        default=1.0,
        metadata={
            "help": "Percentage of the training tokens, at least one sequence, held out for evaluation where the data "
            "set has no validation split."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many sequences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most this many sequences."})

    def __post_init__(self) -> None:
        if self.dataset_name is not None and self.train_file is not None:
            raise ConfigError("--dataset_name and --train_file exclude each other: give one of them")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ConfigError("--dataset_config_name needs --dataset_name")
        if self.dataset_config_name is not None and self.dataset_name == BUILTIN:
            raise ConfigError(f"--dataset_name {BUILTIN} has no configurations: leave out --dataset_config_name")
        if self.validation_file is not None and self.train_file is None:
            raise ConfigError("--validation_file needs --train_file")
        check("sequence_length", self.sequence_length, at_least=2)
        check("validation_split_percentage", self.validation_split_percentage, above=0, below=100)
        for name in ("max_train_samples", "max_eval_samples"):
            limit = getattr(self, name)
            if limit is not None:
                check(name, limit, at_least=1)

    @property
    def source(self) -> str | None:
        """The name of the data set, or the training file; None if no data are given."""
        return self.dataset_name if self.dataset_name is not None else self.train_file


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
