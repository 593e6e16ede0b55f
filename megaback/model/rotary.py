"""Rotary position embeddings, with the frequencies of Llama 2, or scaled as in Llama 3.1.

Shapes: T packed tokens, H heads, E head dimension, R = E / 2 frequencies.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megaback.config import ModelSection


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the tokens' rotary positions, each of shape (T, 1, E)."""

    cos_T1E: Tensor
    sin_T1E: Tensor

    @classmethod
    def at(cls, positions_T: Tensor, shape: ModelSection) -> "Rotary":
        """RoPE (Su et al., "RoFormer", 2021) in the half-split layout of Llama, always in fp32."""
        frequencies_R = frequencies(shape, positions_T.device)
        angles_TE = torch.outer(positions_T.float(), frequencies_R).repeat(1, 2)[:, None, :]
        return cls(angles_TE.cos(), angles_TE.sin())

    def turn(self, heads_THE: Tensor, dtype: torch.dtype) -> Tensor:
        """Heads that are rotated, in a dtype."""
        first, second = heads_THE.float().chunk(2, dim=-1)
        turned_THE = torch.cat((-second, first), dim=-1)
        rotated_THE = heads_THE.float() * self.cos_T1E + turned_THE * self.sin_T1E
        return rotated_THE.to(dtype)


def frequencies(shape: ModelSection, device: torch.device) -> Tensor:
    """Frequencies in radians per token: shape (R,)."""
    unscaled_R = _unscaled(shape, device)
    if shape.rope_scaling_factor == 1:
        return unscaled_R
    return unscaled_R / frequency_divisors(shape, device)


def frequency_divisors(shape: ModelSection, device: torch.device) -> Tensor:
    """Divisors of the frequencies by Llama 3.1's scaling: shape (R,).

    Of frequencies with at most `rope_low_frequency_factor` periods in the original context the
    divisor is the whole factor, of those with at least `rope_high_frequency_factor` it is 1, and
    between them it is interpolated, as by `rope_type: llama3` of transformers.
    """
    context = shape.rope_original_context_tokens
    low, high = shape.rope_low_frequency_factor, shape.rope_high_frequency_factor
    periods_R = context * _unscaled(shape, device) / (2 * math.pi)
    kept_R = ((periods_R - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - kept_R) / shape.rope_scaling_factor + kept_R)


def _unscaled(shape: ModelSection, device: torch.device) -> Tensor:
    half_R = torch.arange(0, shape.head_size, 2, device=device, dtype=torch.float32)
    return shape.rope_theta ** -(half_R / shape.head_size)
