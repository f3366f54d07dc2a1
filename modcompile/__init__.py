"""modcompile: a graph-rewriting compiler for causal language models that do less work per token."""

from typing import TYPE_CHECKING, Any

from modcompile.errors import ModcompileError
from modcompile.version import __version__

if TYPE_CHECKING:
    from modcompile.artifacts import load_with_routers
    from modcompile.layerwise import LayerwiseQuantizeForCausalLM
    from modcompile.modeling import RoutedForCausalLM, set_router_mode

__all__ = [
    "LayerwiseQuantizeForCausalLM",
    "ModcompileError",
    "RoutedForCausalLM",
    "__version__",
    "load_with_routers",
    "set_router_mode",
]

_HOMES = {
    "LayerwiseQuantizeForCausalLM": "modcompile.layerwise",
    "RoutedForCausalLM": "modcompile.modeling",
    "load_with_routers": "modcompile.artifacts",
    "set_router_mode": "modcompile.modeling",
}


def __getattr__(name: str) -> Any:
    # On first use: importing transformers takes seconds, and the command lines report errors and interrupts themselves.
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
