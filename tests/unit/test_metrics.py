"""metrics.jsonl is that of an uninterrupted run, however often the run was interrupted."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaback.metrics import METRICS_NAME, MetricsLog, read_metrics

CONFIG: dict[str, Any] = {"logging": {"every_steps": 10, "wandb": "off"}}
TRAINING = [{"step": step, "loss": 6.0 - step / 10} for step in range(1, 6)]
VALIDATION = {"step": 3, "val_loss": 5.5, "val_bits_per_byte": 2.0, "val_targets": 7}
LINES = [*TRAINING[:3], VALIDATION, *TRAINING[3:]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that made five steps and measured after the third."""
    log = MetricsLog(tmp_path, 0, 10, CONFIG)
    for line in LINES:
        if "loss" in line:
            log.train(line, "")
        else:
            log.validation(line)
    log.close()
    return tmp_path


def test_lines_are_read_as_they_were_written(run: Path) -> None:
    assert read_metrics(run) == LINES


def test_every_line_is_on_the_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, 10, CONFIG)
    log.train(TRAINING[0], "")

    assert read_metrics(tmp_path) == TRAINING[:1]
    log.close()


def test_resuming_cuts_off_what_came_after_the_resumed_step(run: Path) -> None:
    MetricsLog(run, 3, 10, CONFIG).close()

    assert read_metrics(run) == [*TRAINING[:3], VALIDATION]


def test_a_run_that_begins_anew_begins_with_no_lines(run: Path) -> None:
    MetricsLog(run, 0, 10, CONFIG).close()

    assert read_metrics(run) == []


def test_resuming_without_a_file_begins_one(tmp_path: Path) -> None:
    MetricsLog(tmp_path, 3, 10, CONFIG).close()

    assert read_metrics(tmp_path) == []


def test_a_resumed_and_repeated_run_has_the_bytes_of_an_uninterrupted_one(run: Path) -> None:
    before = (run / METRICS_NAME).read_bytes()
    log = MetricsLog(run, 4, 10, CONFIG)
    log.train(TRAINING[4], "")
    log.close()

    assert (run / METRICS_NAME).read_bytes() == before


@pytest.mark.parametrize("cut_bytes", [1, 2, 10, 20])
def test_a_last_line_that_was_cut_short_is_left_out(run: Path, cut_bytes: int) -> None:
    path = run / METRICS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut_bytes])

    # Without its newline alone, the line is still whole.
    assert read_metrics(run) == (LINES if cut_bytes == 1 else LINES[:-1])


def test_after_a_cut_line_a_resumed_run_writes_whole_lines(run: Path) -> None:
    path = run / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-9])

    log = MetricsLog(run, 4, 10, CONFIG)
    log.train(TRAINING[4], "")
    log.close()

    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES


def test_a_file_that_ends_within_null_bytes_after_a_crash_can_be_resumed(run: Path) -> None:
    path = run / METRICS_NAME
    path.write_bytes(path.read_bytes() + b"\0" * 40)

    assert read_metrics(run) == LINES


def test_the_console_has_every_tenth_step_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path, 0, 25, CONFIG)
    for step in range(1, 26):
        log.train({"step": step, "loss": 1.0}, f"number {step}")
    log.close()

    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["10/25", "20/25", "25/25"]


def test_every_measurement_is_on_the_console(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(run, 5, 10, CONFIG)
    log.validation(VALIDATION)
    log.close()

    assert "step 3/10  val loss 5.5000 nats/token, 2.0000 bits/byte over 7 tokens" in (
        capsys.readouterr().out
    )
