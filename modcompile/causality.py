"""Tell a decoder from an encoder by what it computes."""

import torch
from transformers import PreTrainedModel

from modcompile.errors import UnsupportedModelError

_LENGTH = 8


def check_is_causal(model: PreTrainedModel) -> None:
    """Check that no logits depend on a later token: their derivative by the last token's embedding is exactly 0.

    The derivative, and not the difference between two runs: a mask makes it 0 whatever the rounding, while the logits
    of a mixture of experts change in their last bits with the tokens that happen to share an expert.

    Raises:
        UnsupportedModelError: they do (an encoder), or the model does not run on plain tokens, or computes NaN.
    """
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    embedded: list[torch.Tensor] = []

    def keep_output(module: torch.nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        # Some models write into what the embedding returns, which a leaf does not allow.
        return embedded[-1].clone()

    try:
        input_ids = torch.randint(model.config.vocab_size, (1, _LENGTH), generator=generator).to(model.device)
        handle = model.get_input_embeddings().register_forward_hook(keep_output)
        try:
            with torch.enable_grad():
                output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
                logits = output.logits[:, :-1]
                # Random weights, since a plain sum of the logits can be constant.
                weights = torch.randn(logits.shape, generator=generator).to(logits)
                (gradient,) = torch.autograd.grad((logits * weights).sum(), embedded[:1])
        finally:
            handle.remove()
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UnsupportedModelError(f"{name} does not run as a language model on plain tokens: {reason}") from error
    if not (logits.isfinite().all() and gradient.isfinite().all()):
        raise UnsupportedModelError(
            f"{name} computes NaN or infinite logits in {model.dtype}; its weights are damaged, or need another dtype"
        )
    if gradient[:, -1].count_nonzero() > 0:
        raise UnsupportedModelError(
            f"{name} is an encoder: its logits depend on later tokens; modcompile routes causal decoders"
        )
