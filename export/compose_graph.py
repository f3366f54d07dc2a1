"""From a lowered GraphModule to an ONNX graph: calls → function calls, `torch.cond` → `If`.

Before::

    routed_0 = blocks.0(hidden, cos, sin, mask, past_key_0, past_value_0, hidden, least_score_0, token_mask)

        open, routing_mask, needed = decide(router_input, least_score, token_mask)
        hidden, key, value = cond(needed, then_branch, else_branch, [open, hidden, …])

After::

    open, routing_mask, needed = decide(hidden, least_score_0, token_mask, <its parameters>)
    hidden, key, value = If(needed, then_branch = { then(…, <parameters>) }, else_branch = { else(…, <parameters>) })

Every function is a template (`modcompile.export.templates`): calls of modules with the same code call the same
function, and a group of blocks is a call for each of them. The graph is put together from the FX graph here, rather
than by exporting `torch.cond` itself, because only so is a block lowered once for all layers, and because the exporter
gives dimensions behind a `cond` names that nobody can evaluate.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx, nn

from modcompile.export.quantized_translation import DOMAIN as CONTRIB_DOMAIN
from modcompile.export.quantized_translation import VERSION as CONTRIB_VERSION
from modcompile.export.templates import DOMAIN, export_templates
from modcompile.export.translate_modules import OPSET, Example, Specimen, specimen
from modcompile.passes.code_key import code_key
from modcompile.passes.extract_subgraph import get_attribute
from modcompile.passes.keep_last_logits import LAST_TOKENS
from modcompile.passes.outlined_form import is_group
from modcompile.stages import stage

_COND = torch.ops.higher_order.cond


@dataclass(frozen=True)
class Operand:
    """A value of the ONNX graph, and examples of the tensor that it stands for."""

    value: ir.Value
    example: Example


@dataclass(frozen=True)
class _Calls:
    """The calls of modules with the same code: one of the modules; node, module and path of each call."""

    specimen: Specimen
    made: list[tuple[ir.Node, nn.Module, str]] = field(default_factory=list)


@dataclass
class Composer:
    """Builds ONNX nodes; collects the functions that they call and the initializers that they read."""

    functions: dict[str, ir.Function] = field(default_factory=dict)
    initializers: dict[str, ir.Value] = field(default_factory=dict)
    _calls: dict[tuple[Any, ...], _Calls] = field(default_factory=dict)
    _tensors: dict[int, ir.Value] = field(default_factory=dict)

    @stage("composing")
    def compose(self, gm: fx.GraphModule, inputs: Sequence[Operand]) -> tuple[list[ir.Node], list[Operand]]:
        """The nodes of `gm` on `inputs`, and what it returns."""
        composed = self._compose(gm, inputs, "")
        self._connect_calls()
        return composed

    def _compose(self, gm: fx.GraphModule, inputs: Sequence[Operand], path: str) -> tuple[list[ir.Node], list[Operand]]:
        """The same, with calls that have no parameters yet; `path` is where `gm` stands in the whole model."""
        nodes: list[ir.Node] = []
        env: dict[fx.Node, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(tensor := get_attribute(gm, str(node.target)), torch.Tensor):
                env[node] = Operand(self._initializer(tensor, f"{path}{node.target}"), (tensor, tensor))
            elif node.op == "call_module":
                module = gm.get_submodule(str(node.target))
                args = [env[arg] for arg in node.args]
                added, env[node] = self._call(module, args, f"{path}{node.target}.")
                nodes += added
            elif node.op == "call_function" and node.target is _COND:
                conditional, env[node] = self._if(gm, node, env, path)
                nodes.append(conditional)
            elif node.op == "call_function" and node.target is LAST_TOKENS:
                added, env[node] = self._last_tokens(env[node.args[0]], env[node.args[1]], path)
                nodes += added
            elif node.op == "call_function":
                env[node] = env[node.args[0]][node.args[1]]
        (output,) = gm.graph.find_nodes(op="output")
        return nodes, [env[node] for node in output.args[0]]

    def _call(self, module: nn.Module, args: list[Operand], path: str) -> tuple[list[ir.Node], list[Operand]]:
        if isinstance(module, fx.GraphModule) and (is_group(module) or _has_cond(module)):
            return self._compose(module, args, path)
        sizes = tuple((first.shape, second.shape, first.dtype) for first, second in (arg.example for arg in args))
        key = (code_key(module), sizes)
        if key not in self._calls:
            name = path.rstrip(".").replace(".", "_")
            self._calls[key] = _Calls(specimen(name, module, [arg.example for arg in args]))
        calls = self._calls[key]
        outputs = calls.specimen.outputs
        node = ir.Node(
            DOMAIN,
            calls.specimen.name,
            [arg.value for arg in args],
            outputs=_values(path, len(outputs)),
            name=path.rstrip("."),
        )
        calls.made.append((node, module, path))
        return [node], [Operand(*pair) for pair in zip(node.outputs, outputs, strict=True)]

    def _connect_calls(self) -> None:
        """Export what is called, all of it at once, and give the calls the parameters and constants that it takes."""
        templates = export_templates([calls.specimen for calls in self._calls.values()])
        for calls, template in zip(self._calls.values(), templates, strict=True):
            name = template.function.name
            self.functions[name] = template.function
            constants = [self._constant(value, name) for value in template.constants]
            for node, module, path in calls.made:
                state = [self._initializer(get_attribute(module, name), f"{path}{name}") for name in template.state]
                taken = len(node.inputs)
                node.resize_inputs(taken + len(state) + len(constants))
                for index, value in enumerate((*state, *constants), taken):
                    node.replace_input_with(index, value)

    def _if(
        self, gm: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], path: str
    ) -> tuple[ir.Node, list[Operand]]:
        call: Any = node.args
        needed, then_branch, else_branch, operands = call
        args = [env[operand] for operand in operands]
        name = f"{path}{node.name.replace('cond', 'if')}"  # if, if_1, if_2 in the block
        attributes: list[ir.Attr] = []
        examples: list[Example] = []
        for attribute, branch in (("then_branch", then_branch), ("else_branch", else_branch)):
            module = gm.get_submodule(str(branch.target))
            nodes, results = self._call(module, args, f"{path}{branch.target}.")
            graph = ir.Graph([], [result.value for result in results], nodes=nodes, name=f"{name}.{attribute}")
            attributes.append(ir.AttrGraph(attribute, graph))
            # Of the first branch: in a chain, the other may return empty tensors, which nobody reads.
            examples = examples or [result.example for result in results]
        outputs = _values(f"{name}.", len(examples))
        conditional = ir.Node("", "If", [env[needed].value], attributes, outputs=outputs, name=name)
        return conditional, [Operand(*pair) for pair in zip(conditional.outputs, examples, strict=True)]

    def _last_tokens(self, x: Operand, count: Operand, path: str) -> tuple[list[ir.Node], Operand]:
        end = self.constant(f"{path}last_tokens.end", torch.tensor([sys.maxsize]))
        axis = self.constant(f"{path}last_tokens.axis", torch.tensor([1]))
        start = ir.Node("", "Neg", [count.value], outputs=_values(f"{path}last_tokens.start.", 1))
        last = ir.Node("", "Slice", [x.value, start.outputs[0], end, axis], outputs=_values(f"{path}last_tokens.", 1))
        return [start, last], Operand(last.outputs[0], x.example)

    def _initializer(self, tensor: torch.Tensor, name: str) -> ir.Value:
        if id(tensor) not in self._tensors:
            data = tensor_adapters.TorchTensor(tensor.detach(), name=name)
            self._tensors[id(tensor)] = self._add(name, data)
        return self._tensors[id(tensor)]

    def _constant(self, value: ir.Value, function: str) -> ir.Value:
        name = f"{function}.{value.name}"
        assert value.const_value is not None
        return self.initializers.get(name) or self._add(name, value.const_value)

    def constant(self, name: str, tensor: torch.Tensor) -> ir.Value:
        """An initializer that belongs to no module."""
        return self._add(name, tensor_adapters.TorchTensor(tensor, name=name))

    def _add(self, name: str, data: ir.TensorProtocol) -> ir.Value:
        shape = ir.Shape(data.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(data.dtype), shape=shape, const_value=data)
        self.initializers[name] = value
        return value


def _has_cond(gm: fx.GraphModule) -> bool:
    return any(node.target is _COND for node in gm.graph.nodes)


def _values(path: str, count: int) -> list[ir.Value]:
    # Names of our own: the automatic ones are unique in a graph, but not between a graph and the branches of its Ifs.
    return [ir.Value(name=f"{path}{index}") for index in range(count)]


def opset_imports() -> dict[str, int]:
    """The operator sets of a composed graph, before its functions are inlined."""
    return {"": OPSET, DOMAIN: 1, CONTRIB_DOMAIN: CONTRIB_VERSION}
