"""Area under the ROC curve, with a bootstrap interval over documents."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megaback.scoring.bootstrap import Interval

_RESAMPLES = 1000
_TAIL_PERCENT = 2.5


def auc(good: Sequence[float], bad: Sequence[float]) -> float:
    """Probability that a good document has a higher value than a bad one; half for equal ones.

    Hanley and McNeil (1982): the Mann-Whitney statistic divided by the number of pairs.
    """
    return _auc(np.asarray(good, dtype=np.float64), np.asarray(bad, dtype=np.float64))


def auc_interval(good: Sequence[float], bad: Sequence[float], seed: int = 0) -> Interval:
    """AUC and 95% of its resamples; good and bad documents are resampled separately."""
    good_N = np.asarray(good, dtype=np.float64)
    bad_M = np.asarray(bad, dtype=np.float64)
    generator = np.random.default_rng(seed)
    found = [
        _auc(generator.choice(good_N, len(good_N)), generator.choice(bad_M, len(bad_M)))
        for _ in range(_RESAMPLES)
    ]
    low, high = np.percentile(found, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return Interval(_auc(good_N, bad_M), float(low), float(high))


def _auc(good_N: npt.NDArray[np.float64], bad_M: npt.NDArray[np.float64]) -> float:
    sorted_M = np.sort(bad_M)
    below_N = np.searchsorted(sorted_M, good_N, side="left")
    at_most_N = np.searchsorted(sorted_M, good_N, side="right")
    return float((below_N + at_most_N).sum() / (2 * len(good_N) * len(bad_M)))
