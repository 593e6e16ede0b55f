"""Lists of values on a command line, and their combinations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from tools.sweeps.axes import Axis, axes_of, points_of, split_values

VALUES = st.sampled_from(["1e-3", "[a,b]", "{0: 3, 0.8: 1}", '"x, y"', "it's", "[{a: 'b,c'}, d]"])


@given(st.lists(VALUES, min_size=1, max_size=5))
def test_commas_within_brackets_braces_and_quotes_do_not_separate(values: list[str]) -> None:
    assert list(split_values(",".join(values))) == values
    assert list(split_values(" , ".join(values))) == values


def test_keys_with_one_value_are_of_all_runs() -> None:
    axes, common = axes_of(["a.b=1,2", "c=x", "d=[1,2]"])

    assert axes == [Axis("a.b", ("1", "2"))]
    assert common == ("c=x", "d=[1,2]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["a=1,,2"], "empty value"),
        (["a=1,2,"], "empty value"),
        (["a=1,2", "a=3"], "a is given twice"),
        (["run=a,b"], "--out FOLDER"),
    ],
)
def test_wrong_lists_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        axes_of(overrides)


def test_the_first_seed_is_combined_with_everything_before_the_second() -> None:
    axes, _ = axes_of(["a=1,2", "training.seed=0,1", "b=3,4"])

    points = points_of(axes, [])

    assert [tuple(point.values()) for point in points[:4]] == [
        *(("1", "0", "3"), ("1", "0", "4"), ("2", "0", "3"), ("2", "0", "4"))
    ]
    assert len(points) == 8
    assert list(points[0]) == ["a", "training.seed", "b"]


def test_zipped_keys_are_taken_together() -> None:
    axes, _ = axes_of(["w=64,128", "r=1,2", "h=2,4"])

    points = points_of(axes, ["w,h"])

    assert [(point["w"], point["h"]) for point in points] == [("64", "2")] * 2 + [("128", "4")] * 2


@pytest.mark.parametrize(
    ("zipped", "message"),
    [
        (["a,c"], "c=VALUE,VALUE"),
        (["a"], "two or more keys"),
        (["a,b"], "a has 2, b has 3"),
        (["a,d", "d,a"], "d twice|a twice"),
    ],
)
def test_wrong_zips_are_refused(zipped: list[str], message: str) -> None:
    axes, _ = axes_of(["a=1,2", "b=1,2,3", "d=1,2"])

    with pytest.raises(ConfigError, match=message):
        points_of(axes, zipped)
