"""Generate the code of a graph when somebody runs it.

`fx.GraphModule` turns its graph into Python and compiles that as soon as it is made, and all graphs in it once more. Of
what passes return, the next pass reads the graph alone, so that this was a quarter of the time of an export.
"""

import copy
from typing import Any

from torch import fx


class LazyGraphModule(fx.GraphModule):
    """A GraphModule that is compiled by its first call, and by the first one after `recompile`."""

    def recompile(self) -> Any:
        """Forget the code, if there is any."""
        if "forward" in vars(type(self)):  # Every GraphModule has a class of its own, which holds its code.
            del type(self).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compile, and run what has taken the place of this."""
        self._compile_once()
        return type(self).forward(self, *args, **kwargs)

    def __reduce__(self) -> Any:
        """As a plain GraphModule, which is pickled by its code."""
        return copy.copy(self).__reduce__()

    @property
    def code(self) -> str:
        """The code, as Python."""
        self._compile_once()
        return super().code

    def __str__(self) -> str:
        self._compile_once()
        return super().__str__()

    def _compile_once(self) -> None:
        if "forward" not in vars(type(self)):
            super().recompile()
