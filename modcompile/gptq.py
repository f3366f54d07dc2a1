"""Round a weight so that the product with its inputs changes least, not the weight itself: GPTQ.

Of a weight W `[N, K]` and a rounded one Q, the product with inputs X `[tokens, K]` changes by
``tr((W - Q) H (W - Q)ᵀ)`` in all, where the Hessian H is ``Xᵀ X`` (or a weighted sum over tokens). Columns are rounded
one after the other; what a column loses is made up for by those that are still to come, as far as H says that their
inputs go together (Frantar et al. 2022, https://arxiv.org/abs/2210.17323).

The libraries that do this (GPTQModel, llm-compressor, Neural Compressor) go by the modules of architectures that they
know and write one precision in formats of their own; what is needed here is one tensor at a time, found in a trace,
and then the same for what rounding has left over.
"""

import torch

from modcompile.quantization import QuantizedWeight, choose_clipped_qparams, choose_qparams, round_to_codes

_DAMPING = 0.1
"""Share of the mean of the Hessian's diagonal that is added to it: the text is a sample, and H may be singular.

More than the paper's 0.01, which fits other text no better and moves weights further from where they were, so that
more is left over for the next part: nested 2 + 2 bits then change products 1.2 times as much, 2 + 2 + 4 bits 1.3 times.
"""

_CLIPPED_BITS = 2
"""Up to how many bits a scale may leave extremes out: with four steps in all, what they cost the others is more."""


def factor_inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The upper U `[K, K]`, float32, with ``Uᵀ U`` the inverse of the damped Hessian `[K, K]`.

    An input that never occurs goes with no other: its weights are rounded to nearest, and others do not count on them.

    Raises:
        ValueError: the Hessian holds NaN or infinity.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds NaN or infinity")
    damped = hessian.double().clone()
    damping = _DAMPING * float(damped.diagonal().mean())
    damped.diagonal().add_(damping or 1.0)
    # With J the reversal of the order: J H J = L Lᵀ, so H = (J L J)(J L J)ᵀ, and U = (J L J)⁻¹ = J L⁻¹ J.
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: torch.Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1).float()


def quantize_gptq(
    weight: torch.Tensor, factor: torch.Tensor, num_bits: int, group_size: int, *, symmetric: bool = True
) -> QuantizedWeight:
    """Quantize a weight `[N, K]` for inputs of which `factor_inverse` has made `factor` `[K, K]`.

    A group's scale is chosen for what its weights are when its turn comes: the original ones and what they have to make
    up for. With few bits it may clip them (`choose_clipped_qparams`): later columns make up for that, too.
    """
    out_features, in_features = weight.shape
    num_groups = -(-in_features // group_size)
    # A column is a row here, in one piece. What is cut short is filled up with zeros, whose code is the zero point.
    left = weight.float().T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(num_groups * group_size, out_features, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(num_groups, out_features, device=weight.device)
    zero_points = torch.empty(num_groups, out_features, dtype=torch.uint8, device=weight.device)
    for group, start in enumerate(range(0, in_features, group_size)):
        end = min(start + group_size, in_features)
        choose = choose_clipped_qparams if num_bits <= _CLIPPED_BITS else choose_qparams
        scales[group], zero_points[group] = choose(left[start:end].T, num_bits, symmetric=symmetric)
        codes[start : start + group_size] = zero_points[group]
        errors = _round_group(
            left[start:end], factor[start:end, start:end], codes[start:end], scales[group], zero_points[group], num_bits
        )
        # All later columns at once: a group is small, and they are many.
        left[end:] -= factor[start:end, end:].T @ errors
    by_group = codes.T.reshape(out_features, num_groups, group_size)
    return QuantizedWeight(by_group, scales.T.contiguous(), zero_points.T.contiguous(), num_bits)


def _round_group(
    left: torch.Tensor,
    factor: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    num_bits: int,
) -> torch.Tensor:
    """Round the columns of one group, `left` `[g, N]`, into `codes` `[g, N]`; return their errors `[g, N]`.

    An error is divided by the diagonal of `factor`, so that the rest of the factor's row spreads it.
    """
    errors = torch.empty_like(left)
    zeros = zero_points.float()
    for column, diagonal in enumerate(factor.diagonal().tolist()):
        rounded = round_to_codes(left[column], scales, zeros, num_bits)
        codes[column] = rounded
        errors[column] = (left[column] - (rounded - zeros) * scales) / diagonal
        left[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return errors
