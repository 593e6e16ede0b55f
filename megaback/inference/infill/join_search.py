"""Search for joins of forward and backward halves: every possible join, estimated.

A join takes the first ids of a forward half and the first ids of a backward half. Its score is
estimated from both models' tables, without running them again; docs/infill.md has the formulas.
Guarantees: the same halves and tables give the same joins in the same order.

Shapes: A cuts of a forward half, J backward halves, B their cuts, C cuts of a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaback.inference.infill.join_scores import Floats, Half, JoinScores
from megaback.inference.steps import Steps

_CUTS_PER_PAIR = 4
"""Number of joins per pair of halves: adjacent cuts of the same pair are similar."""


@dataclass(frozen=True, kw_only=True)
class Join:
    """The first ids of a forward half, and the first ids of a backward half."""

    forward: int
    forward_cut: int
    backward: int
    backward_cut: int
    estimate: float
    """Estimate of the score, in nats per token."""


def mean_per_token(
    forward: npt.ArrayLike,
    backward: npt.ArrayLike,
    forward_tokens: npt.ArrayLike,
    backward_tokens: npt.ArrayLike,
    forward_weight: float,
) -> Floats:
    """The score: weighted nats of both models per weighted token that they scored."""
    weight = forward_weight
    nats = weight * np.asarray(forward) + (1 - weight) * np.asarray(backward)
    tokens = weight * np.asarray(forward_tokens) + (1 - weight) * np.asarray(backward_tokens)
    mean: Floats = nats / np.maximum(tokens, 1)
    return mean


def best_join_steps(
    forward_halves: Sequence[Half],
    backward_halves: Sequence[Half],
    forward: JoinScores,
    backward: JoinScores,
    *,
    min_tokens: int,
    max_tokens: int,
    forward_weight: float,
) -> Steps[list[Join]]:
    """Joins with `min_tokens` to `max_tokens`, the best estimate first; a few per pair of halves.

    A step is one forward half.
    """
    longest_A, longest_B = forward.own_IA.shape[1], backward.own_IA.shape[1]
    cuts_A11 = np.arange(1, longest_A + 1)[:, None, None]
    cuts_B = np.arange(1, longest_B + 1)
    cuts_A1B = cuts_A11 + cuts_B
    new_JB = np.stack([cuts_B * (not half.is_given) for half in backward_halves])
    is_there_JB = np.stack([cuts_B <= len(half.ids) for half in backward_halves])
    joins = []
    for number, half in enumerate(forward_halves):
        score_AJB = mean_per_token(
            forward.of_own(number),
            backward.of_other(number),
            cuts_A1B + forward.tokens_after,
            cuts_A1B + backward.tokens_after,
            forward_weight,
        )
        new_AJB = cuts_A11 * (not half.is_given) + new_JB
        is_allowed_AJB = (new_AJB >= min_tokens) & (new_AJB <= max_tokens) & is_there_JB
        is_allowed_AJB &= cuts_A11 <= len(half.ids)
        score_AJB[~is_allowed_AJB] = -np.inf
        flat_JC = score_AJB.transpose(1, 0, 2).reshape(len(backward_halves), -1)
        for other, best in enumerate(_best(flat_JC)):
            joins += [
                Join(
                    forward=number,
                    forward_cut=at // longest_B + 1,
                    backward=other,
                    backward_cut=at % longest_B + 1,
                    estimate=score,
                )
                for at, score in best
                if np.isfinite(score)
            ]
        yield
    return sorted(joins, key=lambda join: -join.estimate)


def _best(score_JC: Floats) -> list[list[tuple[int, float]]]:
    """Columns and values of the few best of each row, the best first, at ties the first column.

    Replaces them by -inf. Far faster than sorting all of the thousands of columns.
    """
    rows_J = np.arange(len(score_JC))
    best: list[list[tuple[int, float]]] = [[] for _ in rows_J]
    for _ in range(_CUTS_PER_PAIR):
        best_J = score_JC.argmax(axis=1)
        values_J = score_JC[rows_J, best_J]
        for of_row, at, value in zip(best, best_J.tolist(), values_J.tolist(), strict=True):
            of_row.append((at, value))
        score_JC[rows_J, best_J] = -np.inf
    return best
