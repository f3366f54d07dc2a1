"""Write a routed model as an ONNX folder: build, save, verify, and only then put it where it was asked for."""

import math
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from modcompile.artifacts import base_files, has_trained_routers, update_report
from modcompile.calibrated_thresholds import calibrated_for, threshold_for, write_thresholds
from modcompile.checkpoint_sources import find_checkpoint
from modcompile.checkpoints import load_tokenizer
from modcompile.corpus import builtin_documents
from modcompile.durable_files import write_json
from modcompile.errors import OutputError, VerificationError
from modcompile.export.build_model import build_model
from modcompile.export.decide_folding import DecidedFolding, decide_folding
from modcompile.export.export_config import ExportConfig
from modcompile.export.exportable import Exportable, load_exportable, of_gates
from modcompile.export.folding import UNFOLDED, asked_folding
from modcompile.export.genai_config import write_genai_config
from modcompile.export.layer_work import work_metadata
from modcompile.export.session import MODEL_FILE
from modcompile.export.unmasked_branch import wants_unmasked_branch
from modcompile.export.verification import NOT_VERIFIED, Verification, versions
from modcompile.export.verification_inputs import NUM_TEXTS
from modcompile.export.verify_model import verify_model
from modcompile.export.write_model import write_model
from modcompile.modeling import RoutedForCausalLM
from modcompile.output_folder import check_writable_target, staged_folder
from modcompile.progress import quiet_transformers, show_elapsed
from modcompile.quantized_folder import QUANTIZATION_CONFIG
from modcompile.sampling import load_generation_config
from modcompile.stages import stage

VERIFICATION = "verification.json"
_DATA_FILE = f"{MODEL_FILE}.data"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin")


def is_onnx_folder(folder: Path) -> bool:
    """Whether the folder was made by an export, passed or failed."""
    return (folder / VERIFICATION).is_file()


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and proved, and the seconds that its stages took."""

    output: Path
    config: ExportConfig
    verification: Verification
    seconds: dict[str, float]
    num_bytes: int
    """Of the model and its weights."""
    folding: DecidedFolding | None
    """None where no gates were to be folded."""

    def as_json(self) -> dict[str, Any]:
        """What `report.json` tells."""
        rounding = self.config.weight_rounding
        return {
            "output": str(self.output),
            "weights": self.config.weights,
            "rounding": self.config.rounding if rounding else None,
            "group_size": rounding and rounding.group_size,
            "bytes": self.num_bytes,
            "seconds": self.seconds,
            "folding": self.folding and self.folding.as_json(),
            **self.verification.as_json(),
        }

    def summary(self) -> str:
        """Three lines for a person, one less if nothing was verified; more for gates and for rounded weights."""
        proved = self.verification
        stages = ", ".join(f"{stage} {time:.1f} s" for stage, time in self.seconds.items())
        gates = f"\n{self.folding.summary()}" if self.folding else ""
        wrote = f"wrote {self.output} ({stages}), {self.num_bytes / 1e6:.1f} MB{gates}"
        if proved.skipped:
            return f"{wrote}\n{NOT_VERIFIED}; to have it compared, export with --verify full"
        spent = f"active ratio {proved.active_ratio:.3f}"
        if not math.isnan(proved.average_bits):
            spent = f"{proved.average_bits:.2f} bits on average"
        rounding = self.config.weight_rounding
        lost = ""
        if self.config.weights != "fp32":
            groups = f" in groups of {rounding.group_size} by {self.config.rounding}" if rounding else ""
            lost = (
                f"\n{self.config.weights} weights{groups}: on longer texts perplexity "
                f"{proved.perplexity_rounded['onnx']:.3f} as shipped, {proved.perplexity_unrounded:.3f} before rounding"
            )
        return (
            f"{wrote}\n"
            f"verified on {proved.compared_tokens:,} tokens: logits differ by at most "
            f"{proved.max_logit_difference:.1e}, {proved.equal_routes:.2%} of {proved.compared_routes:,} routes are "
            "equal, every branch of every If was seen\n"
            f"on these texts perplexity {proved.perplexity_torch:.3f} in PyTorch, {proved.perplexity_onnx:.3f} in "
            f"ONNX Runtime, {spent}{lost}"
        )


def export_folder(
    source: Path,
    output: Path,
    config: ExportConfig,
    *,
    overwrite: bool = False,
    at_hand: RoutedForCausalLM | None = None,
) -> ExportResult:
    """Export the routed or quantized folder `source` to `output`.

    `output` appears only once the artifact is verified, unless `config` wants it unproved. If it differs from PyTorch,
    `output` holds nothing but `verification.json`.

    `at_hand`, in float32, is the model that `source` has just been written from, so that it need not be read again.

    Raises:
        ArtifactError, CheckpointError: `source` can't be read.
        ConfigError: `config` folds layers that have no gates, or rounds for a text what is quantized already.
        DataError: weights are to be rounded for a text, and there is no tokenizer, or one of another model.
        UnsupportedModelError: weights are to be rounded, and are look-up tables in part, or too large for float16.
        VerificationError: ONNX Runtime does not compute what PyTorch does, or no input can show that it does.
        OutputError: `output` can't be written, is not ours to replace, or is or holds `source`.
    """
    target, origin = check_writable_target(output, overwrite=overwrite, is_ours=is_onnx_folder), source.resolve()
    if target == origin or target in origin.parents:
        raise OutputError(f"{target} is or holds the folder that is exported; choose another --output_dir")
    seconds: dict[str, float] = {}

    @cache
    def tokenizer_of() -> PreTrainedTokenizerBase | None:
        return load_tokenizer(find_checkpoint(str(source.resolve())))

    def texts_of(config: PretrainedConfig) -> Sequence[Sequence[int]]:
        return _texts(tokenizer_of(), config)

    with _timed("loading and tracing", seconds):
        if at_hand is not None:
            at_hand.set_router_mode(threshold_for(source, config.hard_threshold))
            model = of_gates(at_hand, config, texts_of, tokenizer_of)
        else:
            model = load_exportable(source, config, texts_of, tokenizer_of)
        generation = load_generation_config(source, model.config)
        max_positions = model.max_positions if config.target == "ort" else None
        calibrated = calibrated_for(source, len(model.foldable.model.gated_layers)) if model.foldable else []

    def build(exportable: Exportable) -> ir.Model:
        gm = exportable.graph()
        return build_model(
            gm,
            emit_routing=config.emit_routing,
            max_positions=max_positions,
            compact=config.prefill == "compact",
            unmasked_branch=config.target == "ort"
            and wants_unmasked_branch(config.unmasked_branch, gm, integers=config.weight_rounding is not None),
            half=config.weights == "fp16",
        )

    folding = None
    with staged_folder(output, overwrite=overwrite, is_ours=is_onnx_folder) as staging:
        if model.foldable is not None:
            gates = model.foldable.model.gated_layers
            granularity = model.foldable.model.router_config.granularity
            asked = asked_folding(config.always_active, config.always_skipped, gates, granularity)
            # What untrained routers do on some text says nothing about what they will do.
            if config.fold_gates == "auto" and has_trained_routers(source):
                with _timed("folding gates", seconds):
                    folding = decide_folding(model.foldable, asked, build, staging)
            elif asked != UNFOLDED:
                folding = DecidedFolding(gates, asked)
            decided = folding.folding if folding else UNFOLDED
            if calibrated:
                kept = [tuple(decided.kept(each.thresholds, gates)) for each in calibrated]
                of_kept = [replace(each, thresholds=mine) for each, mine in zip(calibrated, kept, strict=True)]
                write_thresholds(of_kept, staging)
            model = model.foldable.fold(decided)
        with _timed("lowering to ONNX", seconds):
            onnx_model = build(model)
            onnx_model.metadata_props.update(folding.folding.metadata() if folding else {})
            if model.foldable is not None:
                onnx_model.metadata_props.update(work_metadata(model.foldable.model.work))
        with _timed("writing the ONNX model", seconds):
            write_model(onnx_model, staging / MODEL_FILE, _DATA_FILE)
            write_genai_config(staging, onnx_model, model.config, generation, tokenizer_of())
            del onnx_model
            for file in base_files(source):
                if not file.name.endswith(_WEIGHTS) and file.name != QUANTIZATION_CONFIG:
                    shutil.copyfile(file, staging / file.name)
        if model.proof is None:
            verification = Verification(skipped=True, versions=versions())
        else:
            with _timed("verifying", seconds):
                verification = verify_model(model.proof.subject, staging, model.proof.cases)
        if verification.failures:
            for file in list(staging.iterdir()):
                file.unlink()
        write_json(staging / VERIFICATION, verification.as_json())
    if verification.failures:
        raise VerificationError(
            f"the exported model does not compute what PyTorch does: {'; '.join(verification.failures)} "
            f"(no model was left; details in {output / VERIFICATION})"
        )
    num_bytes = sum((output / name).stat().st_size for name in (MODEL_FILE, _DATA_FILE))
    result = ExportResult(output, config, verification, seconds, num_bytes, folding)
    update_report(source, "export", result.as_json())
    return result


def _texts(tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> Sequence[Sequence[int]]:
    """Rows of held-out English, or of random tokens for a model without a tokenizer."""
    if tokenizer is not None:
        with quiet_transformers():  # The text is longer than the model's positions, its parts are not.
            tokens = tokenizer("\n\n".join(builtin_documents("test"))).input_ids
        if len(tokens) >= NUM_TEXTS and max(tokens) < config.vocab_size:
            length = len(tokens) // NUM_TEXTS
            return [tokens[start * length :][:length] for start in range(NUM_TEXTS)]
    numbers = random.Random(0)
    return [[numbers.randrange(config.vocab_size) for _ in range(64)] for _ in range(NUM_TEXTS)]


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = perf_counter()
    with stage(name), show_elapsed(name):
        yield
    seconds[name] = round(perf_counter() - start, 2)
