"""A run's segments in wandb's files have every step once, as metrics.jsonl has."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import wandb

from megaback.config import Config
from megaback.tracking.tracker import BEFORE_ALL_STEPS
from megaback.tracking.trackers import Trackers
from megaback.tracking.wandb_log import read_records
from tests.helpers.run_config import run_config

# Several hundred bytes per step, enough for a few blocks of 32 KiB.
WORDS = "it is what it was " * 30


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the tester's own wandb account."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # wandb sets its own


def config_of(run: Path, mode: str = "offline") -> Config:
    return run_config(run, logging={"wandb": mode, "tensorboard": "off"})


def line(step: int, factor: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": factor * step, "skipped": WORDS}


class Segments:
    """Starts of a run, as MetricsLog makes them, with a list for metrics.jsonl."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.metrics: list[dict[str, Any]] = []

    def start(self, resumed_step: int, last: int, factor: float = 1.0) -> Path:
        """Resume at a step and train to another; returns wandb's log."""
        known = set(self.logs())
        self.wait_for_a_name()
        self.metrics = [one for one in self.metrics if resumed_step and one["step"] <= resumed_step]
        said: list[str] = []
        trackers = Trackers(config_of(self.run), resumed_step or BEFORE_ALL_STEPS, said.append)
        trackers.feed(self.metrics)
        for step in range(resumed_step + 1, last + 1):
            self.metrics.append(line(step, factor))
            trackers.feed(self.metrics[-1:])
            if step % 10 == 0:
                self.metrics.append({"step": step, "val_by_context": {"1": {"loss": factor}}})
                trackers.feed(self.metrics[-1:])
        trackers.close()
        assert said == []
        return (set(self.logs()) - known).pop()

    def wait_for_a_name(self) -> None:
        """wandb names a segment by its second."""
        while time.strftime("%Y%m%d_%H%M%S") in "".join(map(str, self.logs())):
            time.sleep(0.05)

    def logs(self) -> list[Path]:
        return sorted(self.run.glob("wandb/offline-run-*/*.wandb"))

    def rows(self) -> list[dict[str, Any]]:
        """wandb's history over all segments."""
        return [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.items}
            for record in map(_history, self.logs())
            for record in record
        ]

    def expected(self) -> list[tuple[int, float, float | None]]:
        measured = {
            one["step"]: one["val_by_context"]["1"]["loss"]
            for one in self.metrics
            if "val_by_context" in one
        }
        return [
            (one["step"], one["loss"], measured.get(one["step"]))
            for one in self.metrics
            if "loss" in one
        ]

    def shown(self) -> list[tuple[int, float, float | None]]:
        return [
            (row["_step"], row["loss"], row.get("val_by_context/1/loss")) for row in self.rows()
        ]


def _history(log: Path) -> list[Any]:
    return [
        SimpleNamespace(items=record.history.item)
        for _, record in read_records(log)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def segments(tmp_path: Path) -> Segments:
    return Segments(tmp_path)


def kill(log: Path, share: float) -> None:
    """Truncate a log as a kill may have."""
    os.truncate(log, int(log.stat().st_size * share))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_after_a_kill_the_history_has_every_step_once(segments: Segments, share: float) -> None:
    kill(segments.start(0, 50), share)  # up to step 15 or so, or 35, which is cut back
    segments.start(20, 60, factor=-1.0)

    assert segments.shown() == segments.expected()
    assert len(segments.expected()) == 60


def test_a_run_that_starts_again_has_no_row_of_its_first_start(segments: Segments) -> None:
    segments.start(0, 12)
    segments.start(0, 9, factor=-1.0)

    assert segments.shown() == segments.expected()


def test_samples_are_a_table_of_their_step(segments: Segments) -> None:
    trackers = Trackers(config_of(segments.run), BEFORE_ALL_STEPS, pytest.fail)
    trackers.feed([line(1), line(2), {"step": 2, "val_loss": 3.0}])
    trackers.feed_samples(2, [("the end", "it is the end")])
    trackers.feed([line(3)])
    trackers.close()

    rows = segments.rows()
    assert [row["_step"] for row in rows] == [1, 2, 3]
    assert ["samples" in row for row in rows] == [False, True, False]
    (path,) = segments.run.glob("wandb/offline-run-*/files/media/table/samples_2_*.json")
    assert json.loads(path.read_text())["data"] == [["the end", "it is the end"]]


def test_a_synced_segment_is_not_changed_and_its_steps_are_not_repeated(
    segments: Segments,
) -> None:
    log = segments.start(0, 30)
    log.with_name(log.name + ".synced").touch()
    before = log.read_bytes()
    segments.wait_for_a_name()
    trackers = Trackers(config_of(segments.run), 20, lambda _: None)
    trackers.feed(segments.metrics)
    trackers.feed([line(step, -1.0) for step in range(21, 33)])
    trackers.close()

    assert log.read_bytes() == before
    assert [row["_step"] for row in segments.rows()] == [*range(1, 33)]


def test_all_segments_have_the_one_id_of_the_run(segments: Segments) -> None:
    logs = [segments.start(0, 2), segments.start(2, 4)]
    ids = [
        record.run.run_id
        for log in logs
        for _, record in read_records(log)
        if record.WhichOneof("record_type") == "run"
    ]

    assert ids == [(segments.run / "wandb_id.txt").read_text().strip()] * 2


def test_a_crash_of_wandb_is_reported_once_and_the_next_start_backfills(
    segments: Segments, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    trackers = Trackers(config_of(segments.run), BEFORE_ALL_STEPS, said.append)
    for process in psutil.Process().children(recursive=True):
        if "wandb-core" in process.name():
            process.kill()
            process.wait()
    segments.metrics = [line(step) for step in range(1, 31)]
    for one in segments.metrics:
        trackers.feed([one])
        time.sleep(0.005)
    trackers.close()
    assert len(said) == 1
    assert said[0].startswith("wandb has failed (")
    assert "training continues without it" in said[0]

    segments.start(30, 32)
    assert segments.shown() == segments.expected()
    assert "Traceback" not in capfd.readouterr().err


class FakeServer:
    """Return value of wandb.init online, for a server that has rows up to a step."""

    def __init__(self, next_step: int) -> None:
        self.starting_step = next_step
        self.options: dict[str, Any] = {}
        self.steps: list[int] = []

    def init(self, **options: Any) -> "FakeServer":
        self.options = options
        return self

    def log(self, _values: Mapping[str, Any], step: int) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize(
    ("next_step", "sent"), [(0, [*range(1, 9)]), (4, [4, 5, 6, 7, 8]), (7, [7, 8])]
)
def test_online_the_server_gets_the_steps_that_it_lacks(
    next_step: int, sent: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(next_step)
    monkeypatch.setattr(wandb, "init", server.init)
    trackers = Trackers(config_of(tmp_path, "online"), 5, lambda _: None)
    trackers.feed([line(step) for step in range(1, 6)])
    trackers.feed([line(step) for step in range(6, 9)])

    assert server.steps == sent
    assert (server.options["mode"], server.options["resume"]) == ("online", "allow")
