"""A `model.onnx` of ours in ONNX Runtime: its session, and what goes in and out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from modcompile.errors import ArtifactError

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LOGITS, LOGITS_TO_KEEP = "logits", "logits_to_keep"
_PAST, _PRESENT = "past_key_values.", "present."
_CACHE, _IN_PLACE = "modcompile.cache", "in_place"


class LoadedModel:
    """The session of a file, with the names of its inputs and outputs.

    `pasts` has shapes `[B, heads, P, D]`, whose B and P are names; `presents` are in the same order, and `told` is what
    else the artifact tells than logits and presents; `metadata` is what it says of itself. `optional` has the shapes of
    inputs that need not be fed. `in_place` says whether past and present may share the memory of a cache with room to
    spare. `device` is where the session computes.

    Raises:
        ArtifactError: the file is missing, ONNX Runtime can't load it, or it is not one of ours.
    """

    def __init__(self, model_file: Path, *, num_threads: int | None, providers: Sequence[str] | None) -> None:
        if not model_file.is_file():
            raise ArtifactError(f"{model_file} does not exist; make it with python -m modcompile.export DIR")
        self._model_file = model_file
        options = ort.SessionOptions()
        options.log_severity_level = 3  # else a line of warning for the optional input, at every load
        # A plan of memory is good for one shape, and a cache that grows, or a mask, has another in every step: in every
        # branch of every layer a plan would be looked up, made and stored.
        options.enable_mem_pattern = False
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            self.session = ort.InferenceSession(str(model_file), options, providers=list(providers or _providers()))
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime can't load {model_file}: {error}") from error
        inputs = {value.name: value.shape for value in self.session.get_inputs()}
        outputs = [value.name for value in self.session.get_outputs()]
        self.optional = {value.name: value.shape for value in self.session.get_overridable_initializers()}
        self.pasts = {name: shape for name, shape in inputs.items() if name.startswith(_PAST)}
        self.presents = [name.replace(_PAST, _PRESENT) for name in self.pasts]
        for name in {INPUT_IDS, ATTENTION_MASK, LOGITS, *self.presents} - {*inputs, *outputs}:
            raise ArtifactError(f"{model_file} has no {name}: it was not made by python -m modcompile.export")
        self.told = [name for name in outputs if name not in (LOGITS, *self.presents)]
        self.takes_positions = POSITION_IDS in inputs
        self.metadata: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.in_place = self.metadata.get(_CACHE) == _IN_PLACE
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"

    def run(self, binding: ort.IOBinding) -> None:
        """Run the session on what is bound.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model.
        """
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime can't run {self._model_file}: {error}") from error


def _providers() -> list[str]:
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return [name for name in wanted if name in ort.get_available_providers()]
