"""Prove that the exported artifact computes what PyTorch computes, or say that it does not."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from modcompile.export.paired_steps import paired_steps
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.verification import Verification, versions
from modcompile.export.verification_inputs import Case
from modcompile.modeling import RoutedForCausalLM

def verify_model(model: RoutedForCausalLM, folder: Path, cases: Sequence[Case]) -> Verification:
    """Check `folder/model.onnx`, then run every case in PyTorch and in ONNX Runtime, on the CPU, and compare.

    Logits are compared at every token that is not padding, up to the first route of its row that differs. Routes are read
    from a second graph on the same weights that differs in having them as outputs; it is not kept.
    """
    result = Verification(versions=versions())
    try:
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        result.failures.append(f"the ONNX checker refuses the model: {str(error).splitlines()[0]}")
        return result

    telling = folder / ".routing.onnx"
    try:
        _save_with_routes(folder / MODEL_FILE, telling, model.routed_layers)
        # One session after the other: each holds the weights.
        plain = _plain_difference(model, folder / MODEL_FILE, cases[0])
        _run_cases(model, RoutedSession(telling, providers=["CPUExecutionProvider"]), cases, result)
        result.cases["as shipped"] = plain
        result.max_logit_difference = max(result.cases.values())
        result.judge()
    finally:
        telling.unlink(missing_ok=True)
    return result


def _run_cases(
    model: RoutedForCausalLM, session: RoutedSession, cases: Sequence[Case], result: Verification
) -> None:
    executed = np.zeros(len(model.routed_layers), bool)
    skipped = np.zeros_like(executed)
    losses: list[tuple[float, float, int]] = []
    own = cases[0].thresholds
    active = tokens_seen = equal = 0
    before = model.hard_thresholds
    for case in cases:
        model.set_router_mode(list(case.thresholds))
        session.thresholds = case.thresholds
        same = np.ones(len(case.prefills), bool)
        largest = 0.0
        for step in paired_steps(model, session, case):
            tokens = step.tokens
            routes_equal = (step.torch_routes == step.onnx_routes) | ~tokens
            equal += int((routes_equal & tokens).sum())
            result.compared_routes += int(tokens.sum()) * len(executed)
            same &= routes_equal.all((0, 2))
            valid = tokens & same[:, None]
            difference = np.abs(step.torch_logits - step.onnx_logits)[valid]
            if difference.size:
                largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
            result.compared_tokens += int(valid.sum())
            executed |= step.onnx_routes.any((1, 2))
            skipped |= ~step.onnx_routes.any((1, 2))
            if case.thresholds == own and len(case.prefills) == 1:
                active += int((step.onnx_routes & tokens).sum())
                tokens_seen += int(tokens.sum())
                losses.append(step.losses())
        result.cases[case.name] = max(largest, result.cases.get(case.name, 0.0))
    model.set_router_mode(before)

    result.equal_routes = equal / result.compared_routes if result.compared_routes else 1.0
    count = sum(number for _, _, number in losses)
    if count:
        result.perplexity_torch = math.exp(sum(loss for loss, _, _ in losses) / count)
        result.perplexity_onnx = math.exp(sum(loss for _, loss, _ in losses) / count)
    result.active_ratio = active / (tokens_seen * len(executed)) if len(executed) else 1.0
    result.never_executed = [layer for layer, seen in zip(model.routed_layers, executed, strict=True) if not seen]
    result.never_skipped = [layer for layer, seen in zip(model.routed_layers, skipped, strict=True) if not seen]


def _plain_difference(model: RoutedForCausalLM, model_file: Path, case: Case) -> float:
    """The shipped graph itself, as its users run it: with the thresholds that it holds."""
    session = RoutedSession(model_file, providers=["CPUExecutionProvider"])
    ids = np.array([case.prefills[0] + case.decodes[0]])
    mask = np.ones_like(ids)
    logits, _, _ = session.run(ids, mask, mask.cumsum(1) - 1, session.empty_cache(1))
    before = model.hard_thresholds
    model.set_router_mode(list(case.thresholds))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    model.set_router_mode(before)
    return float(np.nan_to_num(np.abs(logits - expected), nan=np.inf).max())


def _save_with_routes(source: Path, target: Path, layers: Sequence[int]) -> None:
    model = ir.load(source)
    present = {value.name for value in model.graph.outputs}
    values = {value.name: value for node in model.graph for value in node.outputs}
    axis = ir.Value(name=".routing.axis", const_value=ir.tensor([2], name=".routing.axis"))
    model.graph.register_initializer(axis)
    for layer in layers:
        if f"routing.{layer}" not in present:
            squeezed = ir.Value(name=f"routing.{layer}", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape((None, None)))
            model.graph.append(ir.Node("", "Squeeze", [values[f"blocks.{layer}.decide.1"], axis], outputs=[squeezed]))
            model.graph.outputs.append(squeezed)
    ir.save(model, target)
