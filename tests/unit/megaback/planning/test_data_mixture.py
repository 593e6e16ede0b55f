"""Mixtures of a run: epochs of each data set, limits on repetition, and the length of the run."""

from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.loading.loader import TrainingLoader
from megaback.config import TrainingSection
from megaback.config_batch import BatchSection
from megaback.config_data import DataSection
from megaback.planning.data_mixture import DataMixture, constant_mixture, plan_mixture
from tests.helpers.batches import data_set, some_shards
from tests.helpers.loaders import BATCH_ROWS, Corpus, Reading

BATCH = BatchSection(context_tokens=64, global_batch_rows=10, micro_batch_rows=1)


def section_of(web: dict[str, Any], books: dict[str, Any], **more: Any) -> DataSection:
    return DataSection(shards=[{"path": "web", **web}, {"path": "books", **books}], **more)


def planned(
    web: dict[str, Any], books: dict[str, Any], length: dict[str, Any], **more: Any
) -> DataMixture:
    """A run on 10,000 rows of web and 500 rows of books."""
    section = section_of(web, books, **more)
    return plan_mixture(section, BATCH, TrainingSection(**length), [10_000, 500])


def test_epochs_and_shares_follow_the_weights() -> None:
    found = planned({"weight": {0: 3, 0.5: 1}}, {}, {"steps": 200})
    web, books = found.uses
    assert (web.first_share, web.last_share) == (0.75, 0.5)
    assert (web.epochs, books.epochs) == (0.125, 1.5)
    assert (web.share, books.share) == (0.625, 0.375)
    assert (
        web.shown()
        == "web: 62.5% of the rows (at first 75.0%, at last 50.0%), 1,250 rows, 0.12 epochs"
    )


def test_positions_in_tokens_do_not_move_with_the_length_of_the_run() -> None:
    weights = {"weight": {0: 1, 1000 * 64: 0}}, {}
    short, long = (
        planned(*weights, {"steps": steps}, weight_positions="tokens") for steps in (100, 300)
    )
    for found in (short, long):
        assert found.mixture.counts(1500) == [500, 1000]
    of_fraction = planned({"weight": {0: 1, 0.5: 0}}, {}, {"steps": 300})
    assert of_fraction.mixture.counts(1500) == [750, 750]


def test_a_run_of_epochs_has_the_mean_shares_of_its_weights() -> None:
    linear = {"weight": {0: 0, 1: 1}, "weight_interpolation": "linear"}
    found = planned(linear, {"weight": {0: 1, 1: 0}, "weight_interpolation": "linear"}, EPOCH)
    assert found.total_steps == 2000
    assert found.uses[0].epochs == pytest.approx(1.0, abs=1e-4)


EPOCH = {"epochs": 1.0}


def test_a_dropped_data_set_has_read_its_epochs_at_the_planned_step() -> None:
    found = planned({}, {"max_epochs": 2}, {"steps": 400})
    assert (found.total_steps, found.end_reason) == (400, None)
    assert found.uses[1].epochs == 2
    assert (found.uses[1].dropped_after_step, found.uses[1].last_share) == (200, 0)
    assert found.uses[1].shown().endswith("2.00 epochs, dropped after step 200")
    assert found.mixture.counts(2000) == [1000, 1000]


def test_a_data_set_can_end_the_run() -> None:
    books = {"max_epochs": 2, "after_max_epochs": "stop"}
    found = planned({}, books, {"steps": 400})
    assert (found.total_steps, found.uses[1].epochs) == (200, 2)
    assert found.end_reason == "books has been read 2 times (max_epochs)"
    assert planned({}, books, {"steps": 150}).end_reason is None


def test_a_run_ends_when_no_data_set_is_left_even_for_a_time() -> None:
    web = {"weight": {0: 1, 0.5: 0, 0.9: 1}}
    found = planned(web, {"weight": {0: 0, 0.5: 1}, "max_epochs": 1}, {"steps": 200})
    assert found.total_steps == 150
    assert found.end_reason == (
        "books has been read 1 times (max_epochs), and no other data set has a weight then"
    )


def test_a_single_data_set_ends_the_run_when_it_is_dropped() -> None:
    section = DataSection(shards=[{"path": "web", "max_epochs": 1.5}])
    found = plan_mixture(section, BATCH, TrainingSection(steps=400), [103])
    assert found.total_steps == 15
    assert found.end_reason == "web has been read 1.5 times (max_epochs)"


def test_a_run_of_more_rows_than_there_are_numbers_is_planned() -> None:
    found = planned({"weight": {0: 3, 0.5: 1}}, {"max_epochs": 1e6}, {"steps": (1 << 63) - 1})
    assert found.uses[1].epochs == 1e6
    assert found.mixture.counts(400) == [300, 100]


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="within the first step, of 10 rows; raise max_epochs"):
        planned({"max_epochs": 1e-4, "after_max_epochs": "stop"}, {}, {"steps": 4})
    with pytest.raises(ConfigError, match=r"set training\.steps"):
        planned({"weight": {0: 1, 640: 2}}, {}, EPOCH, weight_positions="tokens")
    for changing in ({"weight": {0: 1, 0.5: 2}}, {"max_epochs": 2}):
        with pytest.raises(ConfigError, match="are for training runs only"):
            constant_mixture(section_of(changing, {}))


@pytest.mark.parametrize("num_data_sets", [2, 3, 5, 30])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_that_restart_read_as_many_rows_of_each_data_set_as_are_planned(
    num_data_sets: int, world_size: int
) -> None:
    steps, generator = 12, np.random.default_rng(num_data_sets)
    parts = [
        {
            "path": str(number),
            "weight": {0: first, 0.3: second, 0.7: third},
            "weight_interpolation": ("step", "linear")[number % 2],
        }
        for number, (first, second, third) in enumerate(
            generator.exponential(size=(num_data_sets, 3)).tolist()
        )
    ]
    batch = BatchSection(context_tokens=16, global_batch_rows=BATCH_ROWS, micro_batch_rows=1)
    found = plan_mixture(
        DataSection(shards=parts), batch, TrainingSection(steps=steps), [100] * num_data_sets
    )
    same = [1] * num_data_sets
    with data_set(some_shards()) as data:
        corpus = Corpus([data] * num_data_sets, Reading(lanes=same, lane_rows=same))
        counts = np.zeros(num_data_sets, dtype=np.int64)
        for start, stop in ((0, steps // 3), (steps // 3, steps)):
            ranks = [
                TrainingLoader(corpus.streams(), found.mixture, BATCH_ROWS, rank, world_size, 1)
                for rank in range(world_size)
            ]
            for step in range(start, stop):
                for rank in ranks:
                    counts += np.bincount(rank.places(step)[0], minlength=num_data_sets)
                assert found.mixture.counts((step + 1) * BATCH_ROWS) == counts.tolist()
    assert [use.rows for use in found.uses] == counts.tolist()
