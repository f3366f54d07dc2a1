"""From a prompt to the tokens of a model."""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from modcompile.errors import ArtifactError, ConfigError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False) -> torch.Tensor:
    """The tokens of a prompt, `[1, T]`, as the tokenizer starts a text, or with `chat` as its template asks a question.

    Raises:
        ConfigError: the prompt is empty, or the tokenizer has no chat template.
    """
    if not prompt:
        raise ConfigError("--prompt is empty; give some text to continue")
    encoded: Any
    if chat:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "--chat needs a chat template, and the tokenizer of this model has none; leave --chat out"
            )
        message = {"role": "user", "content": prompt}
        encoded = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt", verbose=False)
    input_ids: torch.Tensor = encoded["input_ids"].long()
    if not input_ids.numel():
        raise ConfigError(f"--prompt {prompt!r} has no token for this tokenizer; give some text to continue")
    return input_ids


def check_fits(input_ids: torch.Tensor, max_new_tokens: int, config: PretrainedConfig) -> None:
    """Check that a prompt `[1, T]` and what is to follow fit the model.

    Raises:
        ConfigError: they have more tokens than the model has positions.
        ArtifactError: the prompt has a token that the model does not have.
    """
    positions = getattr(config, "max_position_embeddings", None)
    length = input_ids.shape[1]
    if positions is not None and length + max_new_tokens > positions:
        raise ConfigError(
            f"--prompt has {length} tokens, with --max_new_tokens {max_new_tokens} more than the {positions} positions "
            "of the model; shorten the one or lower the other"
        )
    largest = int(input_ids.max())
    if largest >= config.vocab_size:
        raise ArtifactError(
            f"the tokenizer gives the token {largest}, but the model has {config.vocab_size}: "
            "they do not belong together"
        )
