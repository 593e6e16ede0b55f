"""Trackers are backfilled, get no step twice, and never end a run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import BackendError
from megaback.config import Config
from megaback.tracking import trackers
from megaback.tracking.tracker import BEFORE_ALL_STEPS, Value, flat_values
from megaback.tracking.trackers import Trackers
from tests.helpers.run_config import run_config

Start = Callable[[Config, int], Any]


class Notebook:
    """A tracker that records its calls."""

    def __init__(self, held_step: int = BEFORE_ALL_STEPS, breaks_at: int | None = None) -> None:
        self.held_step = held_step
        self.written: list[tuple[int, Mapping[str, Value]]] = []
        self.samples: list[tuple[int, int, int]] = []
        """Step and number of samples, and number of lines that were written before."""
        self.is_closed = False
        self._breaks_at = breaks_at

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        if step == self._breaks_at:
            raise ConnectionResetError("Connection lost")
        self.written.append((step, values))

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        self.samples.append((step, len(texts), len(self.written)))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return run_config(tmp_path)


@pytest.fixture
def start_with(monkeypatch: pytest.MonkeyPatch, config: Config) -> Callable[..., Trackers]:
    """`start_with(starts, last_step, said)`: trackers that these functions start."""

    def start(starts: dict[str, Start], last_step: int, said: list[str]) -> Trackers:
        monkeypatch.setattr(trackers, "_STARTS", starts)
        return Trackers(config, last_step, said.append)

    return start


def lines(first: int, last: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": float(step)} for step in range(first, last + 1)]


def with_logging(config: Config, **logging: str) -> Config:
    section = config.logging.model_copy(update=logging)
    return config.model_copy(update={"logging": section})


def test_each_tracker_gets_the_steps_that_it_lacks(start_with: Callable[..., Trackers]) -> None:
    new, old = Notebook(), Notebook(held_step=3)
    both = start_with({"new": lambda *_: new, "old": lambda *_: old}, 5, [])
    both.feed(lines(1, 5))
    both.feed(lines(6, 6))
    both.close()

    assert [step for step, _ in new.written] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in old.written] == [4, 5, 6]
    assert new.is_closed
    assert old.is_closed


def test_samples_follow_the_lines_of_their_step(start_with: Callable[..., Trackers]) -> None:
    new, old = Notebook(), Notebook(held_step=3)
    both = start_with({"new": lambda *_: new, "old": lambda *_: old}, 5, [])
    both.feed([*lines(1, 3), {"step": 3, "val_loss": 1.0}, *lines(4, 5)], {3: [], 5: []})
    both.feed(lines(6, 6))
    both.feed_samples(6, [("end", "the end")])

    assert new.samples == [(3, 0, 4), (5, 0, 6), (6, 1, 7)]
    assert old.samples == [(5, 0, 2), (6, 1, 3)]


def test_steps_that_a_tracker_has_beyond_the_resumed_one_are_not_repeated(
    start_with: Callable[..., Trackers],
) -> None:
    ahead, said = Notebook(held_step=7), list[str]()
    start_with({"ahead": lambda *_: ahead}, 5, said).feed(lines(6, 9))

    assert [step for step, _ in ahead.written] == [8, 9]
    assert said == ["ahead already has steps up to 7; they are not logged there again"]


def test_a_tracker_that_fails_is_dropped_and_named_once(
    start_with: Callable[..., Trackers],
) -> None:
    broken, well, said = Notebook(breaks_at=2), Notebook(), list[str]()
    both = start_with({"broken": lambda *_: broken, "well": lambda *_: well}, -1, said)
    both.feed(lines(1, 4))
    both.close()

    assert [step for step, _ in broken.written] == [1]
    assert not broken.is_closed
    assert [step for step, _ in well.written] == [1, 2, 3, 4]
    assert said == [
        "broken has failed (ConnectionResetError: Connection lost); training continues without "
        "it, and the next start backfills it from metrics.jsonl"
    ]


def test_a_tracker_that_does_not_start_is_dropped_without_printing_secrets(
    start_with: Callable[..., Trackers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame")
    said: list[str] = []

    def start(config: Config, last_step: int) -> None:
        raise RuntimeError("the key sesame\nis refused")

    start_with({"picky": start}, -1, said).feed(lines(1, 3))

    (sentence,) = said
    assert "picky did not start (RuntimeError: the key $WANDB_API_KEY is refused)" in sentence
    assert "sesame" not in sentence


def uninstall(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a module unavailable, even if another test has imported it."""
    for module in [known for known in sys.modules if known.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(("name", "value"), [("wandb", "offline"), ("tensorboard", "on")])
def test_a_configured_tracker_that_is_not_installed_is_an_error(
    name: str, value: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall(name, monkeypatch)

    with pytest.raises(BackendError, match=f"{name} is not installed.*pip install {name}"):
        Trackers(with_logging(config, **{name: value}), -1, pytest.fail)


def test_tensorboard_on_auto_is_skipped_if_not_installed(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall("tensorboard", monkeypatch)
    Trackers(config, -1, pytest.fail).feed(lines(1, 2))

    assert list(config.run.iterdir()) == []


def test_trackers_that_are_off_are_not_started(config: Config) -> None:
    Trackers(with_logging(config, tensorboard="off"), -1, pytest.fail).feed(lines(1, 2))

    assert list(config.run.iterdir()) == []


def test_nested_keys_are_joined_and_unknown_values_omitted() -> None:
    line = {
        "step": 7,
        "loss": None,
        "skipped": "the loss is nan",
        "val_by_context": {"2-3": {"loss": 5.1, "bits_per_byte": None, "step": 4}, "4-7": 3.0},
    }

    assert flat_values(line) == {
        "skipped": "the loss is nan",
        "val_by_context/2-3/loss": 5.1,
        "val_by_context/2-3/step": 4,
        "val_by_context/4-7": 3.0,
    }
