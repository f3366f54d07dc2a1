"""One ONNX function for all modules that run the same code.

Blocks of one model differ in their parameters only. So a module is exported once, by `torch.onnx`, as a function whose
parameters are inputs, and called as often as it occurs:

    linear(x, self.w)   →   template(x, w):  MatMul(x, Transpose(w))

Export time then hardly grows with the depth of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer

from modcompile.export.fold_any import FoldAny
from modcompile.export.fold_shapes import FoldShapes
from modcompile.export.quiet_exporter import quiet_exporter
from modcompile.export.translate_modules import Specimen, translate_modules
from modcompile.stages import stage

DOMAIN = "modcompile"

_IR_VERSION = 10


@dataclass(frozen=True)
class Template:
    """An ONNX function.

    Its inputs are those of the module, then `state` (names of parameters and buffers), then `constants`.
    """

    function: ir.Function
    state: tuple[str, ...]
    constants: tuple[ir.Value, ...]


@stage("optimizing templates")
def export_templates(specimens: Sequence[Specimen]) -> list[Template]:
    """A function for each module, called by its name; every dimension that differs between two examples stays free."""
    templates = []
    for item, translation in zip(specimens, translate_modules(specimens), strict=True):
        graph = translation.graph
        model = ir.Model(graph, ir_version=_IR_VERSION)
        with quiet_exporter():
            # Weights are inputs here: what is folded into a constant would be one layer's own.
            onnxscript.optimizer.optimize(model)
            # Not before: the optimizer reads the 0 of a relative shape as a size.
            ir.passes.Sequential(FoldShapes(), FoldAny(), common_passes.RemoveUnusedNodesPass())(model)
        constants = tuple(_lift_constants(graph))
        function = ir.Function(DOMAIN, item.name, graph=graph, attributes=())
        templates.append(Template(function, translation.state, constants))
    return templates


def _lift_constants(graph: ir.Graph) -> Iterator[ir.Value]:
    """Make the initializers inputs, too (a function has none), and yield what they held."""
    for name, value in list(graph.initializers.items()):
        yield ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
