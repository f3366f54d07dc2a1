"""modcompile: a graph-rewriting compiler for causal language models that do less work per token."""

from modcompile.artifacts import load_with_routers
from modcompile.errors import ModcompileError
from modcompile.modeling import RoutedForCausalLM, set_router_mode
from modcompile.version import __version__

__all__ = ["ModcompileError", "RoutedForCausalLM", "__version__", "load_with_routers", "set_router_mode"]
