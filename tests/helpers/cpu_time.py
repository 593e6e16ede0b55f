"""Scaling of run time with input size, in CPU time, as other processes may be busy."""

import time
from collections.abc import Callable

_FACTOR = 8
_SLACK = 3.0
_TRIES = 3


def grows_linearly(work: Callable[[int], object], size: int) -> bool:
    """Whether eight times the size takes about eight times as long; quadratic work takes 64."""
    return _fastest_s(work, size * _FACTOR) < _SLACK * _FACTOR * _fastest_s(work, size)


def _fastest_s(work: Callable[[int], object], size: int) -> float:
    """Fastest of some tries, as any disturbance makes a try slower."""
    tries = []
    for _ in range(_TRIES):
        started_s = time.thread_time()
        work(size)
        tries.append(time.thread_time() - started_s)
    return min(tries)
