"""Prove that the exported artifact computes what PyTorch computes, or say that it does not."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from modcompile.errors import ModcompileError, VerificationError
from modcompile.export.paired_steps import largest, paired_steps
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.subject import Subject
from modcompile.export.verification import Verification, versions
from modcompile.export.verification_inputs import Case
from modcompile.text_loss import TextLoss


def verify_model(subject: Subject, folder: Path, cases: Sequence[Case]) -> Verification:
    """Check `folder/model.onnx`, then run every case in PyTorch and in ONNX Runtime, on the CPU, and compare.

    Logits are compared at every token that is not padding, up to the first route of its row that differs. Routes are
    read from a second graph on the same weights, in which every `If` tells what it did; it is not kept. The first case
    decides as the artifact does by itself. Where logits differ by more than the bound, the subject may know a better
    reference to tell whose fault that is.
    """
    result = Verification(versions=versions())
    telling = folder / ".telling.onnx"
    try:
        onnx.checker.check_model(str(folder / MODEL_FILE), full_check=True)
        _save_telling(subject, folder / MODEL_FILE, telling, cases[0])
        # One session after the other: each holds the weights.
        subject.measure_shipped(_session(folder / MODEL_FILE), cases, result)
        session = _session(telling)
        _run_cases(subject, session, cases, result)
        subject.compare_shipped(session, cases, result)
        result.max_logit_difference = max(result.cases.values())
        doubtful = [case for case in cases if case.name in result.cases_out_of_bounds]
        result.errors_to_double = subject.arbitrate(session, doubtful) if doubtful else {}
        result.judge()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        result.failures.append(f"the ONNX checker refuses the model: {str(error).splitlines()[0]}")
    except ModcompileError as error:
        result.failures.append(str(error))
    finally:
        subject.restore()
        telling.unlink(missing_ok=True)
    return result


def _session(model_file: Path) -> RoutedSession:
    return RoutedSession(model_file, providers=["CPUExecutionProvider"])


def _run_cases(subject: Subject, session: RoutedSession, cases: Sequence[Case], result: Verification) -> None:
    branches = subject.branches
    seen: list[set[int]] = [set() for _ in branches]
    losses: list[tuple[float, float, int]] = []
    own = cases[0]
    spent = 0.0
    tokens_seen = equal = 0
    for case in cases:
        subject.force(session, case)
        same = np.ones(len(case.prefills), bool)
        worst = 0.0
        for step in paired_steps(subject, session, case):
            tokens = step.tokens
            routes_equal = (step.torch_routes == step.onnx_routes) | ~tokens
            equal += int((routes_equal & tokens).sum())
            result.compared_routes += int(tokens.sum()) * len(branches)
            same &= routes_equal.all((0, 2))
            valid = tokens & same[:, None]
            worst = max(worst, largest((step.torch_logits - step.onnx_logits)[valid]))
            result.compared_tokens += int(valid.sum())
            for taken, branch in zip(seen, step.onnx_branches, strict=True):
                taken.add(branch)
            if (case.thresholds, case.precision_bias) == (own.thresholds, own.precision_bias) and len(tokens) == 1:
                spent += subject.usage(step.onnx_routes, tokens)
                tokens_seen += int(tokens.sum())
                losses.append(step.losses())
        result.cases[case.name] = max(worst, result.cases.get(case.name, 0.0))
    result.equal_routes = equal / result.compared_routes if result.compared_routes else 1.0
    count = sum(number for _, _, number in losses)
    if count:
        result.perplexity_torch = TextLoss(sum(loss for loss, _, _ in losses) / count).perplexity
        result.perplexity_onnx = TextLoss(sum(loss for _, loss, _ in losses) / count).perplexity
    subject.record(result, spent / (tokens_seen * len(branches)) if branches else 0.0)
    for (layer, names), taken in zip(branches.items(), seen, strict=True):
        missing = [name for index, name in enumerate(names) if index not in taken]
        if missing:
            result.never_seen[layer] = missing


def _save_telling(subject: Subject, source: Path, target: Path, case: Case) -> None:
    model = ir.load(source)
    for name, wanted in subject.stored(case).items():
        value = model.graph.initializers.get(name)
        stored = value.const_value if value is not None else None
        if stored is None or not np.array_equal(stored.numpy(), wanted):
            raise VerificationError(f"{name} does not hold what was asked for")
    subject.tell(model)
    ir.save(model, target)
