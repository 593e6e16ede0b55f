"""Names of a sweep's runs."""

import re

from tools.sweeps.runs import run_name, short_names


def test_a_name_has_the_values_that_the_config_resolves_to() -> None:
    name = run_name({"optimizer.learning_rate": 1e-3, "training.seed": 0, "model.base_width": None})

    assert name == "learning_rate-0.001_seed-0_base_width-null"


def test_keys_with_the_same_last_part_are_named_whole() -> None:
    assert short_names(["a.path", "b.path", "c.seed"]) == {
        "a.path": "a.path",
        "b.path": "b.path",
        "c.seed": "seed",
    }


def test_values_that_are_no_file_names_are_distinct_and_safe() -> None:
    values = [
        "../../etc",
        "a/b",
        "a b",
        "a_b",
        "",
        ".",
        0.1234567,
        0.12345671,
        [{"path": "x" * 99}],
    ]

    names = [run_name({"key": value}) for value in values]

    assert len({*names}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9.+_-]{1,60}", name) for name in names), names
    assert len(run_name({f"key{number}": "x" * 40 for number in range(20)})) < 200
