"""The errors that modcompile raises for reasons a user can act on.

::

    ModcompileError
    ├── ConfigError          an option is out of its range, or options contradict each other
    ├── CheckpointError      a model that can't be found, read or used
    ├── UnsupportedModelError  a model that can be read, but not routed
    ├── DataError            a data set that can't be found, read or used
    ├── ArtifactError        a folder of ours that is missing, incomplete, or of another version
    ├── OutputError          a folder that can't be written, or must not be
    └── VerificationError    the exported artifact does not compute what PyTorch does

Every message is one line: what was wrong, where, and what to do.
"""


class ModcompileError(Exception):
    """Base of all errors that the command line turns into one line and exit status 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class ConfigError(ModcompileError):
    """An option is out of its range, or options contradict each other."""


class CheckpointError(ModcompileError):
    """A model that can't be found, read or used."""


class UnsupportedModelError(ModcompileError):
    """A model that can be read, but not routed."""


class DataError(ModcompileError):
    """A data set that can't be found, read or used."""


class ArtifactError(ModcompileError):
    """A routed folder that is missing, incomplete, or made by another version."""


class OutputError(ModcompileError):
    """A folder that can't be written, or must not be."""


class VerificationError(ModcompileError):
    """The exported artifact does not compute what PyTorch does."""
