"""Command-line flags from dataclasses, and what is wrong with them in one line."""

from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from modcompile.errors import ConfigError


def parse_flags(
    prog: str, description: str | None, positional: tuple[str, str] | None, configs: Sequence[type], argv: Sequence[str] | None
) -> tuple[Any, ...]:
    """One instance of each of `configs` from the command line; then the positional argument (name, help), if any.

    Raises:
        ConfigError: a value that a dataclass refuses.
    """
    parser = HfArgumentParser(list(configs), prog=f"python -m {prog}", description=description)
    if positional is not None:
        parser.add_argument(positional[0], help=positional[1])
    try:
        parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        # What the HF arguments refuse, such as tf32 on a machine that has none.
        raise ConfigError(str(error)) from error
    if positional is None:
        return tuple(parsed)
    *dataclasses, namespace = parsed
    return (*dataclasses, getattr(namespace, positional[0]))
