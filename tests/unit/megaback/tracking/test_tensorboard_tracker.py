"""TensorBoard shows every step of a killed and resumed run once, with its last value."""

import os
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaback.tracking.tensorboard_tracker import TensorboardTracker
from megaback.tracking.tracker import BEFORE_ALL_STEPS

Points = list[tuple[int, float]]


def start(run: Path, resumed_step: int, last: int, factor: float = 1.0) -> Path:
    """Resume at a step and train to another, with the earlier lines of metrics.jsonl."""
    tracker = TensorboardTracker(run, resumed_step or BEFORE_ALL_STEPS)
    for step in range(tracker.held_step + 1, last + 1):
        if step == 0:
            tracker.write(0, {"val_loss": 9.0})
            continue
        tracker.write(step, {"loss": factor * step if step > resumed_step else float(step)})
        if step % 5 == 0:
            tracker.write(step, {"val_loss": 0.5 * step, "skipped": "the loss is nan"})
    tracker.close()
    return max(run.glob("tensorboard/events.*"), key=lambda path: path.stat().st_mtime)


def shown(run: Path, tag: str) -> Points:
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def rename_as_older(path: Path) -> None:
    """Event files are read in the order of the seconds in their names."""
    kind, seconds, rest = path.name.split("tfevents")[0], *path.name.split(".", 4)[3:]
    os.replace(path, path.with_name(f"{kind}tfevents.{int(seconds) - 100}.{rest}"))


def test_an_uninterrupted_run_has_every_recorded_value(tmp_path: Path) -> None:
    start(tmp_path, 0, 12)

    assert shown(tmp_path, "loss") == [(step, float(step)) for step in range(1, 13)]
    assert shown(tmp_path, "val_loss") == [(0, 9.0), (5, 2.5), (10, 5.0)]


def test_text_values_are_omitted(tmp_path: Path) -> None:
    start(tmp_path, 0, 5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    assert sorted(events.Tags()["scalars"]) == ["loss", "val_loss"]


def test_samples_are_a_table_of_the_texts_as_they_are(tmp_path: Path) -> None:
    tracker = TensorboardTracker(tmp_path, BEFORE_ALL_STEPS)
    tracker.write_samples(3, [("the end", "<b>so|*it*\nis the end")])
    tracker.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("samples/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert text.endswith("|the end|&lt;b&gt;so\\|\\*it\\*<br>is the end|")


def test_repeated_steps_replace_earlier_ones(tmp_path: Path) -> None:
    rename_as_older(start(tmp_path, 0, 12))
    start(tmp_path, 7, 15, factor=-1.0)

    expected = [(step, float(step if step <= 7 else -step)) for step in range(1, 16)]
    assert shown(tmp_path, "loss") == expected
    assert shown(tmp_path, "val_loss") == [(0, 9.0), (5, 2.5), (10, 5.0), (15, 7.5)]


@pytest.mark.parametrize("num_bytes", [0, 5, 30, 150, 300, 301, 302, 303, 350, 400])
def test_events_that_a_kill_lost_are_written_again(tmp_path: Path, num_bytes: int) -> None:
    path = start(tmp_path, 0, 12)
    os.truncate(path, num_bytes)
    rename_as_older(path)
    start(tmp_path, 10, 15)

    assert shown(tmp_path, "loss") == [(step, float(step)) for step in range(1, 16)]
    assert shown(tmp_path, "val_loss") == [(0, 9.0), (5, 2.5), (10, 5.0), (15, 7.5)]


def test_a_second_kill_before_the_first_write_loses_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        rename_as_older(start(tmp_path, 0, 12))
    path = start(tmp_path, 7, 9)
    os.truncate(path, 100)
    start(tmp_path, 7, 15)

    assert shown(tmp_path, "loss") == [(step, float(step)) for step in range(1, 16)]


def test_a_run_that_starts_again_shows_nothing_of_its_first_start(tmp_path: Path) -> None:
    rename_as_older(start(tmp_path, 0, 12))
    start(tmp_path, 0, 3, factor=-1.0)

    assert shown(tmp_path, "loss") == [(1, -1.0), (2, -2.0), (3, -3.0)]
    assert shown(tmp_path, "val_loss") == [(0, 9.0)]


def test_a_long_run_is_read_back_quickly(tmp_path: Path) -> None:
    start(tmp_path, 0, 20_000)
    began = time.process_time()
    tracker = TensorboardTracker(tmp_path, 20_000)
    taken_s = time.process_time() - began
    tracker.close()

    assert tracker.held_step == 19_999
    assert taken_s < 5
