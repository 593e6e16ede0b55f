"""Rows of benchmarks become choices in the words of lm_eval's tasks."""

from typing import get_args

import pytest

from megaback.config_validation import BenchmarkName
from megaback.scoring.choices import Choice
from megaback.suites.rows import BENCHMARKS
from tests.helpers.benchmark_rows import EXAMPLES


def test_every_benchmark_can_be_named_in_a_config() -> None:
    assert get_args(BenchmarkName) == (*BENCHMARKS,)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_has_the_texts_of_lm_eval(name: str) -> None:
    fields, contexts, answers, label = EXAMPLES[name]
    row = BENCHMARKS[name].row(fields)

    assert row.label == label
    assert row.choices == tuple(map(Choice, contexts, answers))
