"""Prove that the exported artifact computes what PyTorch computes, or say that it does not."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from modcompile.errors import ModcompileError, VerificationError
from modcompile.export.compare_in_double import errors_to_double
from modcompile.export.paired_steps import paired_steps
from modcompile.export.session import MODEL_FILE, THRESHOLD_INPUT, Array, RoutedSession
from modcompile.export.tell_routes import TellRoutes
from modcompile.export.verification import Verification, versions
from modcompile.export.verification_inputs import Case
from modcompile.modeling import RoutedForCausalLM


def verify_model(model: RoutedForCausalLM, folder: Path, cases: Sequence[Case]) -> Verification:
    """Check `folder/model.onnx`, then run every case in PyTorch and in ONNX Runtime, on the CPU, and compare.

    Logits are compared at every token that is not padding, up to the first route of its row that differs. Routes are
    read from a second graph on the same weights, in which every `If` tells what it did; it is not kept. The first case
    has the thresholds that the artifact holds. Where logits differ by more than the bound, float64 decides whose fault
    that is (`errors_to_double`).
    """
    result = Verification(versions=versions())
    telling = folder / ".routing.onnx"
    try:
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        _save_telling(folder / MODEL_FILE, telling, model.routed_layers, cases[0].thresholds)
        # One session after the other: each holds the weights.
        shipped = _logits(_session(folder / MODEL_FILE), cases[0])
        session = _session(telling)
        _run_cases(model, session, cases, result)
        session.thresholds = cases[0].thresholds
        result.cases["as shipped"] = _largest(shipped - _logits(session, cases[0]))
        result.max_logit_difference = max(result.cases.values())
        doubtful = [case for case in cases if case.name in result.cases_out_of_bounds]
        result.errors_to_double = errors_to_double(model, session, doubtful) if doubtful else {}
        result.judge()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        result.failures.append(f"the ONNX checker refuses the model: {str(error).splitlines()[0]}")
    except ModcompileError as error:
        result.failures.append(str(error))
    finally:
        telling.unlink(missing_ok=True)
    return result


def _session(model_file: Path) -> RoutedSession:
    return RoutedSession(model_file, providers=["CPUExecutionProvider"])


def _run_cases(model: RoutedForCausalLM, session: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
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
            largest = max(largest, _largest((step.torch_logits - step.onnx_logits)[valid]))
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


def _logits(session: RoutedSession, case: Case) -> Array:
    """Of the first row of a case, prefill and decode steps in one call."""
    ids = np.array([case.prefills[0] + case.decodes[0]])
    mask = np.ones_like(ids)
    logits, _, _ = session.run(ids, mask, mask.cumsum(1) - 1, session.empty_cache(1))
    return logits


def _largest(difference: Array) -> float:
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0))


def _save_telling(source: Path, target: Path, layers: Sequence[int], thresholds: Sequence[float]) -> None:
    model = ir.load(source)
    value = model.graph.initializers.get(THRESHOLD_INPUT)
    stored = value.const_value if value is not None else None
    if stored is None or not np.array_equal(stored.numpy(), np.asarray(thresholds, np.float32)):
        raise VerificationError(f"{THRESHOLD_INPUT} does not hold the thresholds that were asked for")
    TellRoutes(layers)(model)
    ir.save(model, target)
