"""What a routed model learns from the dense one: to predict what that predicts."""

import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel


@torch.no_grad()
def dense_logits(base: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Logits `[B, T, V]` of the untouched model, for `input_ids [B, T]` and `attention_mask [B, T]`."""
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


def divergences(logits: torch.Tensor, dense: torch.Tensor, is_predicted: torch.Tensor) -> torch.Tensor:
    """KL(dense ‖ routed) in nats, of each of the N tokens that are predicted, `[N]`, row by row.

    `logits` and `dense` are `[B, T, V]`; `is_predicted [B, T - 1]` is of the tokens after the first.
    """
    ours, theirs = (log_softmax(each[:, :-1][is_predicted].float(), -1) for each in (logits, dense))
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
