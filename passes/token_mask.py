"""Which tokens of a call are not padding."""

import torch


def token_mask_of(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Of the T new tokens of a call: bool `[B, T, 1]`, from an attention mask `[B, past + T]`."""
    return (attention_mask[:, attention_mask.shape[1] - input_ids.shape[1] :] != 0).unsqueeze(-1)
