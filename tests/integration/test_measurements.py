"""Samples and suites of runs with real ranks: they are recorded, and training is the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaback.tracking.samples_log import read_samples
from tests.helpers.benchmark_rows import save_benchmarks
from tests.helpers.tiny_run import metrics_of

pytestmark = pytest.mark.slow

SHORT = ("training.steps=4", "validation.every_steps=2", "checkpoint.every_steps=null")
SAMPLES = ('validation.samples=["The end", "so it ended."]', "validation.sample_tokens=12")
SUITES = ("openbookqa", "winogrande", "lambada")


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = save_benchmarks(tmp_path_factory.mktemp("saved"), *SUITES)
    return f"validation.suites=[{','.join(SUITES)}]", f"validation.suite_folder={folder}"


def suites_of(run: Path) -> dict[int, Any]:
    return {line["step"]: line["suites"] for line in metrics_of(run) if "suites" in line}


def test_two_ranks_train_the_same_with_samples_and_suites(
    run_of: Callable[..., Path], suites: tuple[str, ...]
) -> None:
    without = run_of(*SHORT, "zero.stage=3")
    run = run_of(*SHORT, *SAMPLES, *suites, "zero.stage=3")

    assert [line for line in metrics_of(run) if "suites" not in line] == metrics_of(without)
    found = [(line["step"], line["given"]) for line in read_samples(run)]
    assert found == [(step, given) for step in (0, 2, 4) for given in ("The end", "so it ended.")]
    output = (run / "output.txt").read_text()
    assert output.count("  sample: ") == len(found)
    assert {*suites_of(run)} == {0, 2, 4}
    assert output.count("chance 0.250, 3 rows") == 3
    assert output.count("measuring took ") == 3


def test_one_rank_measures_what_two_measure(
    run_of: Callable[..., Path], lonely_run_of: Callable[..., Path], suites: tuple[str, ...]
) -> None:
    two = suites_of(run_of(*SHORT, *SAMPLES, *suites, "zero.stage=3"))
    one = suites_of(lonely_run_of("training.steps=1", "validation.every_steps=null", *suites))

    assert one[0] == two[0]
