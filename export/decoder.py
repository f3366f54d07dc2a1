"""Decode a batch step by step in ONNX Runtime, with a cache of its own."""

import numpy as np

from modcompile.export.loaded_model import ATTENTION_MASK, INPUT_IDS, LOGITS_TO_KEEP, POSITION_IDS
from modcompile.export.session import RoutedSession
from modcompile.export.step_binding import Array, Cache, StepBinding


class Decoder:
    """The tokens of `batch` rows so far, to which `step` adds.

    Where the artifact says that its cache may be written in place, every step reads and writes the same memory, which
    has room for `capacity` tokens and doubles when that is full; elsewhere every step allocates a longer cache.
    """

    def __init__(self, session: RoutedSession, batch: int, capacity: int) -> None:
        self._session = session
        self._capacity = max(capacity, 1) if session.model.in_place else 0
        self._cache = session.empty_cache(batch, self._capacity)
        self._mask = np.zeros((batch, 0), np.int64)
        self._overriding = session.overriding
        self._binding: StepBinding | None = None

    @property
    def length(self) -> int:
        """How many tokens each row has, with padding."""
        return self._mask.shape[1]

    def step(
        self, input_ids: Array, tokens: Array | None = None, *, logits_to_keep: int = 1
    ) -> tuple[Array, dict[str, Array]]:
        """Logits `[B, K, V]` of the K last tokens, and what else the artifact tells: masks or bits `[B, T]`, by name.

        `input_ids` are `[B, T]`, and `tokens` says with zeros which of them are padding. The arrays are good until the
        next step. An artifact whose cache is written in place takes several tokens after others for one row only.

        Raises:
            ArtifactError: ONNX Runtime stops in the middle of the model; the rows are then as before the step.
        """
        added = np.ones(input_ids.shape, np.int64) if tokens is None else tokens
        mask = np.concatenate([self._mask, added], 1)
        feeds = {INPUT_IDS: input_ids, ATTENTION_MASK: mask}
        model = self._session.model
        if model.takes_positions:
            # As transformers counts: of tokens only, so that padding moves nothing.
            before = self._mask.sum(1, keepdims=True)
            feeds[POSITION_IDS] = (before + added.cumsum(1) - 1).clip(0)
        if LOGITS_TO_KEEP in model.optional:
            feeds[LOGITS_TO_KEEP] = np.array([logits_to_keep])
        binding = self._bind(mask.shape[1])
        logits, told = binding.run(feeds)
        if not model.in_place:
            self._cache = binding.present
        self._mask = mask
        return logits[:, -logits_to_keep:], told

    def _bind(self, length: int) -> StepBinding:
        """What to run, of a cache with room for so many tokens."""
        session = self._session
        if not session.model.in_place:
            return StepBinding(session.model, session.overriding, self._cache)
        if length > self._capacity:
            self._cache = self._with_room(max(length, 2 * self._capacity))
            self._binding = None
        if self._binding is None or self._overriding is not session.overriding:
            self._overriding = session.overriding
            self._binding = StepBinding(session.model, session.overriding, self._cache, self._cache)
        return self._binding

    def _with_room(self, capacity: int) -> Cache:
        """The cache in memory for `capacity` tokens."""
        batch, filled = self._mask.shape
        roomy = self._session.empty_cache(batch, capacity)
        for old, new in zip(self._cache, roomy, strict=True):
            array = np.zeros(new.shape(), np.float32)
            array[:, :, :filled] = old.numpy()[:, :, :filled]
            new.update_inplace(array)
        self._capacity = capacity
        return roomy
