"""Command-line flags from dataclasses, and what is wrong with them in one line."""

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, NoReturn

from transformers import HfArgumentParser

from modcompile.errors import ConfigError


class _OneLineParser(HfArgumentParser):
    """Leaves the usage, some hundred lines for the flags of training, to --help.

    A field that is true by default may name the flag that makes it false, as `negated` in its metadata, beside --no_….
    One of several types may have in it, as `parse`, what makes a value of a word.
    """

    def add_argument(
        self, *names: Any, negated: str | None = None, parse: Callable[[str], Any] | None = None, **options: Any
    ) -> Any:
        if negated is not None and options.get("action") == "store_false":
            names += (negated,)
        if parse is not None:
            options["type"] = partial(_parsed, parse)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists all flags)")


def _parsed(parse: Callable[[str], Any], word: str) -> Any:
    try:
        return parse(word)
    except ValueError as error:
        raise ArgumentTypeError(f"{word!r} is not understood") from error


def parse_flags(
    prog: str,
    description: str | None,
    positional: tuple[str, str] | None,
    configs: Sequence[type],
    argv: Sequence[str] | None,
) -> tuple[Any, ...]:
    """One instance of each of `configs` from the command line; then the positional argument (name, help), if any.

    Raises:
        ConfigError: an unknown flag, a value that is of another type, or one that a dataclass refuses.
    """
    dataclass_types: list[Any] = list(configs)
    parser = _OneLineParser(dataclass_types, prog=f"python -m {prog}", description=description)
    if positional is not None:
        parser.add_argument(positional[0], help=positional[1])
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args=argv, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError) as error:
        # What the HF arguments refuse, such as tf32 on a machine that has none.
        raise ConfigError(str(error)) from error
    if unknown:
        parser.error(f"unknown: {' '.join(unknown)}")
    if positional is None:
        return tuple(parsed)
    *dataclasses, namespace = parsed
    return (*dataclasses, getattr(namespace, positional[0]))


def named_flags(configs: Sequence[type], argv: Sequence[str] | None) -> set[str]:
    """Those fields of `configs` that a command line that `parse_flags` took gives a value, be it the default."""
    dataclass_types: list[Any] = list(configs)
    # Argparse puts no default where there is a value.
    unnamed = Namespace(**{field.name: None for config in dataclass_types for field in fields(config)})
    parsed, _ = _OneLineParser(dataclass_types).parse_known_args(argv, unnamed)
    return {name for name, value in vars(parsed).items() if value is not None}
