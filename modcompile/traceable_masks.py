"""Attention masks that `torch.export` can record, on every supported version of transformers.

transformers 4.57 makes its masks with `vmap`, which leaves tensors in a trace that can't be used outside of it; for its
own exports it has a variant without, registered here while a model is traced. transformers 5 needs none of this.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import transformers.integrations.executorch as executorch
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "sdpa_without_vmap"


@contextmanager
def traceable_masks(model: PreTrainedModel) -> Iterator[None]:
    """Let `model` make its masks without `vmap`, and then as before."""
    without_vmap = getattr(executorch, "sdpa_mask_without_vmap", None)
    implementation = model.config._attn_implementation
    if without_vmap is None or implementation != "sdpa":
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, without_vmap)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
