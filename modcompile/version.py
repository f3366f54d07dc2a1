"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("modcompile")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.1.0"
