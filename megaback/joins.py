"""Where a text written forward and a text written backward meet: every possible join, estimated.

A join takes the first ids of a forward half and the first ids of a backward half, and its score is
estimated from both models' tables, without running them again; docs/infill.md has the formulas.
Guarantees: the same halves and tables give the same joins in the same order.

Shapes: A cuts of a forward half, J backward halves, B their cuts, C cuts of a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaback.judgement import Floats, Half, Judgement

_CUTS_A_PAIR = 4
"""Neighbouring cuts of the same two halves are mostly alike."""


@dataclass(frozen=True)
class Join:
    """The first ids of a forward half, and the first ids of a backward half."""

    forward: int
    forward_cut: int
    backward: int
    backward_cut: int
    estimate: float
    """Of the score, in nats a token."""


def mean_a_token(
    forward: npt.ArrayLike,
    backward: npt.ArrayLike,
    forward_tokens: npt.ArrayLike,
    backward_tokens: npt.ArrayLike,
    forward_weight: float,
) -> Floats:
    """The score: weighted nats of both models for each weighted token that they judged."""
    weight = forward_weight
    nats = weight * np.asarray(forward) + (1 - weight) * np.asarray(backward)
    tokens = weight * np.asarray(forward_tokens) + (1 - weight) * np.asarray(backward_tokens)
    mean: Floats = nats / np.maximum(tokens, 1)
    return mean


def best_joins(
    forward_halves: Sequence[Half],
    backward_halves: Sequence[Half],
    forward: Judgement,
    backward: Judgement,
    *,
    least_tokens: int,
    most_tokens: int,
    forward_weight: float,
) -> list[Join]:
    """Joins with so many new tokens, the best estimate first; a few of each pair of halves."""
    longest_A, longest_B = forward.own_IA.shape[1], backward.own_IA.shape[1]
    cuts_A11 = np.arange(1, longest_A + 1)[:, None, None]
    cuts_B = np.arange(1, longest_B + 1)
    cuts_A1B = cuts_A11 + cuts_B
    new_JB = np.stack([cuts_B * (not half.is_given) for half in backward_halves])
    is_there_JB = np.stack([cuts_B <= len(half.ids) for half in backward_halves])
    joins = []
    for number, half in enumerate(forward_halves):
        score_AJB = mean_a_token(
            forward.of_own(number),
            backward.of_other(number),
            cuts_A1B + forward.tokens_after,
            cuts_A1B + backward.tokens_after,
            forward_weight,
        )
        new_AJB = cuts_A11 * (not half.is_given) + new_JB
        is_allowed_AJB = (new_AJB >= least_tokens) & (new_AJB <= most_tokens) & is_there_JB
        is_allowed_AJB &= cuts_A11 <= len(half.ids)
        score_AJB[~is_allowed_AJB] = -np.inf
        flat_JC = score_AJB.transpose(1, 0, 2).reshape(len(backward_halves), -1)
        best_JC = np.argsort(-flat_JC, axis=1, kind="stable")[:, :_CUTS_A_PAIR]
        for other, best_C in enumerate(best_JC):
            joins += [
                Join(number, int(at) // longest_B + 1, other, int(at) % longest_B + 1, float(score))
                for at, score in zip(best_C, flat_JC[other, best_C], strict=True)
                if np.isfinite(score)
            ]
    return sorted(joins, key=lambda join: -join.estimate)
