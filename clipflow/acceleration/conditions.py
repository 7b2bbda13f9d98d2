"""Masks of condition tokens as key lengths."""

# Shape suffixes: B = batch, L = condition tokens, D = channels.

from __future__ import annotations

import torch
from torch import Tensor

from clipflow.nn.cross_attention import real_tokens_first


def is_token_mask(mask: Tensor, tokens: Tensor) -> bool:
    """Whether `mask` says of each of `tokens` [B, L, D] only whether it is real."""
    return tokens.ndim == 3 and mask.shape == tokens.shape[:2] and not mask.dtype.is_floating_point


def real_tokens(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """The real tokens of each sample first, and how many they are.

    On the CPU, tokens that no sample needs are cut off; elsewhere that would wait for the device.

    Args:
        tokens: [B, L, D].
        mask: [B, L] integer or bool, nonzero where a token is real. A sample without real tokens
            attends to all of them, as under a bias that is the same for all tokens.

    Returns:
        (tokens [B, L', D], their numbers [B] int64, or None where all L' are real in each sample).
    """
    tokens, lengths = real_tokens_first(tokens, mask != 0)
    lengths = torch.where(lengths == 0, tokens.shape[1], lengths)
    if not tokens.is_cpu or torch.compiler.is_compiling() or not lengths.numel():
        return tokens, lengths
    shortest, longest = int(lengths.min()), int(lengths.max())
    return tokens[:, :longest], None if shortest == longest else lengths
