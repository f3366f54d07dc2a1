"""The options of the data. Parsing them takes no data sets: the library of these is slow to import."""

from dataclasses import dataclass, field

from modcompile.config import check
from modcompile.corpus import BUILTIN
from modcompile.errors import ConfigError


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
