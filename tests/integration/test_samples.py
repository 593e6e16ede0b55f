"""Samples of runs with two ranks: they are written, and training is the same without them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.tracking.samples_log import read_samples
from tests.helpers.tiny_run import metrics_of

pytestmark = pytest.mark.slow

SHORT = ("training.steps=4", "validation.every_steps=2", "checkpoint.every_steps=null")
SAMPLES = ('validation.samples=["The end", "so it ended."]', "validation.sample_tokens=12")


def test_two_ranks_train_the_same_with_samples(run_of: Callable[..., Path]) -> None:
    without = run_of(*SHORT, "zero.stage=3")
    run = run_of(*SHORT, *SAMPLES, "zero.stage=3")

    assert metrics_of(run) == metrics_of(without)
    found = [(line["step"], line["given"]) for line in read_samples(run)]
    assert found == [(step, given) for step in (0, 2, 4) for given in ("The end", "so it ended.")]
    assert (run / "output.txt").read_text().count("  sample: ") == len(found)
