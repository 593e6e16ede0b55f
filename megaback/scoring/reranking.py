"""Reranking by a weighted mean of two scores per candidate, and its accuracy.

    mixed = (1 - weight) * forward + weight * reverse

as in Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016),
section 4.2, where forward is log P(answer | question) and reverse log P(question | answer).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaback.scoring.bootstrap import Interval, mean_interval

Floats = npt.NDArray[np.float64]

_WEIGHTS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Scored:
    """The candidates of one question, all arrays of shape (candidates,)."""

    forward: Floats | None
    reverse: Floats
    is_right: npt.NDArray[np.bool_] | None
    """Correctness of every candidate, if known."""

    def mixed(self, weight: float) -> Floats:
        """The weighted mean of both scores; the reverse ones if there are no forward ones."""
        if self.forward is None:
            return self.reverse
        return (1 - weight) * self.forward + weight * self.reverse


def ranking(scores: Floats) -> list[int]:
    """Indices of candidates, best first; ties keep their order."""
    return [int(number) for number in np.argsort(-scores, kind="stable")]


def rightness(scores: Floats, is_right: npt.NDArray[np.bool_]) -> float:
    """Probability that the best candidate is correct, with ties broken at random."""
    return float(is_right[scores == scores.max()].mean())


def fit_weight(questions: Sequence[Scored]) -> float:
    """The weight, in hundredths, with the highest accuracy; at ties, the one in the middle.

    All questions must be labeled, and have forward scores.
    """
    found = np.array(
        [
            sum(rightness(one.mixed(weight), _is_right(one)) for one in questions)
            for weight in _WEIGHTS
        ]
    )
    best = np.flatnonzero(found >= found.max() - 1e-9)
    return float(_WEIGHTS[best[len(best) // 2]])


def accuracies(questions: Sequence[Scored], weight: float, seed: int = 0) -> dict[str, Interval]:
    """Accuracy of each method, with its interval over questions; all must be labeled.

    `gain` is that of mixed over forward, paired by question.
    """
    labeled = [(one, _is_right(one)) for one in questions]
    found = {
        "random": [float(is_right.mean()) for _, is_right in labeled],
        "reverse": [rightness(one.reverse, is_right) for one, is_right in labeled],
    }
    if all(one.forward is not None for one in questions):
        found["forward"] = [rightness(one.mixed(0.0), is_right) for one, is_right in labeled]
        found["mixed"] = [rightness(one.mixed(weight), is_right) for one, is_right in labeled]
        found["gain"] = list(np.subtract(found["mixed"], found["forward"]))
    found["oracle"] = [float(is_right.any()) for _, is_right in labeled]
    return {name: mean_interval(values, seed) for name, values in found.items()}


def _is_right(question: Scored) -> npt.NDArray[np.bool_]:
    assert question.is_right is not None
    return question.is_right
