"""metrics.jsonl of an interrupted run is that of an uninterrupted one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import CheckpointCorruptError
from megaback.run_folder import METRICS_NAME, SAMPLES_NAME
from megaback.tracking.loss_by_context import ContextLoss, Loss
from megaback.tracking.metrics import MACHINE_FIELDS, RankTimes, StepRecord, read_metrics
from megaback.tracking.metrics_log import MetricsLog
from megaback.tracking.samples_log import read_samples
from tests.helpers.run_config import run_config

STEP_TOKENS = 4 * 64
MEASURED = ContextLoss(Loss(5.5, 2.0, 7), {"1": Loss(6.5, None, 1), "2": Loss(5.3, 1.9, 6)})


def open_log(
    run: Path, resumed_step: int = 0, share: float | None = None, num_devices: int = 2
) -> MetricsLog:
    """The log of a run of 25 steps."""
    config = run_config(run, logging={"every_steps": 10, "tensorboard": "off"})
    return MetricsLog(config, resumed_step, 25, share, num_devices)


def record(step: int, data_wait_share: float = 0.002) -> StepRecord:
    return StepRecord(
        step=step,
        loss=6.0 - step / 10,
        targets=200,
        learning_rate=1e-3,
        gradient_norm=0.5,
        step_s=0.25,
        data_wait_share=data_wait_share,
        memory_peak_bytes=3_200_000_000,
    )


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    """Record training steps, and a validation after the third."""
    for step in range(first, last + 1):
        log.train(record(step))
        if step == 3:
            log.validation(step, MEASURED)
    log.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with five steps."""
    write_steps(open_log(tmp_path), 1, 5)
    return tmp_path


def steps_of(run: Path) -> list[tuple[int, bool]]:
    """The step of every line, and whether it is a validation."""
    return [(line["step"], "val_loss" in line) for line in read_metrics(run)]


FIVE_STEPS = [(1, False), (2, False), (3, False), (3, True), (4, False), (5, False)]


def test_lines_are_in_the_order_of_recording(run: Path) -> None:
    assert steps_of(run) == FIVE_STEPS


def test_a_training_line_has_the_documented_fields(run: Path) -> None:
    assert read_metrics(run)[1] == {
        "step": 2,
        "loss": 5.8,
        "targets": 200,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "step_s": 0.25,
        "tokens_seen": 2 * STEP_TOKENS,
        "tokens_per_s": STEP_TOKENS / 0.25,
        "tokens_per_s_per_device": STEP_TOKENS / 0.25 / 2,
        "data_wait_share": 0.002,
        "memory_peak_bytes": 3_200_000_000,
    }


def test_the_rows_of_each_data_set_are_recorded(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.train(replace(record(1), by_data_set={"web": {"rows": 3}, "books": {"rows": 1}}))
    log.close()
    (line,) = read_metrics(tmp_path)
    assert line["by_data_set"] == {"web": {"rows": 3}, "books": {"rows": 1}}


def test_a_validation_line_has_the_documented_fields(run: Path) -> None:
    assert read_metrics(run)[3] == {
        "step": 3,
        "val_loss": 5.5,
        "val_bits_per_byte": 2.0,
        "val_targets": 7,
        "val_by_context": {
            "1": {"loss": 6.5, "bits_per_byte": None, "targets": 1},
            "2": {"loss": 5.3, "bits_per_byte": 1.9, "targets": 6},
        },
    }


def test_the_time_of_samples_and_their_texts_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    long = "The end" + " and so on" * 30
    log.validation(3, MEASURED, 0.5)
    log.samples(3, [("the end", "so\n\x1b[2Jit is the end"), ("The end", long)])
    log.samples(6, [("end", long + " end")])
    log.close()

    assert read_metrics(tmp_path)[0]["sample_s"] == 0.5
    assert [(line["step"], line["text"]) for line in read_samples(tmp_path)] == [
        (3, "so\n\x1b[2Jit is the end"),
        (3, long),
        (6, long + " end"),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == "step 3/25  sample: so \\x1b[2Jit is the end"
    assert shown[2] == f"step 3/25  sample: {long[:200]}"
    assert shown[3].startswith("step 6/25  sample: …")
    assert shown[3].endswith(" on end")
    open_log(tmp_path, 3).close()
    assert [line["step"] for line in read_samples(tmp_path)] == [3, 3]
    open_log(tmp_path).close()
    assert read_samples(tmp_path) == []


def test_suites_are_recorded_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metric = {"value": 0.5, "low": 0.25, "high": 0.75, "rows": 3, "chance": 0.25}
    diverged = {"value": math.nan, "low": math.nan, "high": math.nan, "rows": 3}
    log = open_log(tmp_path)
    log.suites(4, {"sciq": {"acc": metric}, "lambada": {"bits_per_byte": diverged}}, "5ac1", 0.5)
    log.close()

    (line,) = read_metrics(tmp_path)
    nothing = {"value": None, "low": None, "high": None, "rows": 3}
    suites = {"sciq": {"acc": metric}, "lambada": {"bits_per_byte": nothing}}
    assert line == {"step": 4, "suites": suites, "suites_sha256": "5ac1", "suite_s": 0.5}
    assert capsys.readouterr().out.splitlines() == [
        "step 4/25  sciq: acc 0.500 (0.250 to 0.750); chance 0.250, 3 rows",
        "step 4/25  lambada: bits_per_byte nan (nan to nan); 3 rows",
    ]


@pytest.mark.parametrize(
    "suites", ["[]", '{"sciq": 0.5}', '{"sciq": {"acc": 0.5}}', '{"sciq": {"acc": {"value": "x"}}}']
)
def test_suites_of_another_form_are_refused(suites: str, tmp_path: Path) -> None:
    (tmp_path / METRICS_NAME).write_text(f'{{"step": 1, "suites": {suites}}}\n')

    with pytest.raises(CheckpointCorruptError, match="line 1 is not a line of metrics"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "line", ['["step"]', '{"step": 1, "given": ""}', '{"step": "1", "given": "", "text": ""}']
)
def test_samples_of_another_form_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / SAMPLES_NAME).write_text(f'{{"step": 1, "given": "", "text": ""}}\n{line}\n')

    with pytest.raises(CheckpointCorruptError, match="line 2 is not a sample"):
        open_log(tmp_path, 3)


def test_mfu_is_inversely_proportional_to_the_time_of_a_step(tmp_path: Path) -> None:
    write_steps(open_log(tmp_path, share=0.1), 1, 1)

    assert read_metrics(tmp_path)[0]["mfu"] == pytest.approx(0.4)


def test_every_line_is_written_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.train(record(1))

    assert steps_of(tmp_path) == [(1, False)]
    log.close()


def test_resuming_removes_lines_after_the_resumed_step(run: Path) -> None:
    open_log(run, 3).close()

    assert steps_of(run) == FIVE_STEPS[:4]


def test_a_run_that_starts_again_begins_with_no_lines(run: Path) -> None:
    open_log(run).close()

    assert steps_of(run) == []


def test_resuming_without_a_file_begins_one(tmp_path: Path) -> None:
    open_log(tmp_path, 3).close()

    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("resumed_step", [0, 2, 3, 4, 5])
def test_a_resumed_and_repeated_run_has_the_bytes_of_an_uninterrupted_one(
    resumed_step: int, run: Path
) -> None:
    before = (run / METRICS_NAME).read_bytes()

    write_steps(open_log(run, resumed_step), resumed_step + 1, 5)

    assert (run / METRICS_NAME).read_bytes() == before


@pytest.mark.parametrize("cut_bytes", [1, 2, 10, 20])
def test_a_truncated_last_line_is_skipped(run: Path, cut_bytes: int) -> None:
    path = run / METRICS_NAME
    path.write_bytes(path.read_bytes()[:-cut_bytes])

    # A line that lacks only its newline is complete.
    assert steps_of(run) == (FIVE_STEPS if cut_bytes == 1 else FIVE_STEPS[:-1])


def test_after_a_truncated_line_a_resumed_run_writes_complete_lines(run: Path) -> None:
    path = run / METRICS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])

    write_steps(open_log(run, 4), 5, 5)

    assert path.read_bytes() == whole


def test_null_bytes_of_a_crash_are_skipped(run: Path) -> None:
    path = run / METRICS_NAME
    path.write_bytes(path.read_bytes() + b"\0" * 40)

    assert steps_of(run) == FIVE_STEPS


def test_the_console_has_every_tenth_step_and_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    for step in range(1, 26):
        log.train(record(step))
    log.close()

    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["10/25", "20/25", "25/25"]


def console_text(run: Path, capsys: pytest.CaptureFixture[str], share: float, devices: int) -> str:
    """The console line of a tenth step."""
    log = open_log(run, share=0.1, num_devices=devices)
    log.train(record(10, share))
    log.close()
    return capsys.readouterr().out


def test_the_console_has_the_throughput_per_device_and_the_data_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console_text(tmp_path, capsys, 0.25, 4) == (
        "step 10/25  loss 5.0000  0m04s left  1,024 tokens/s (256 per device)  lr 1.00e-03  "
        "norm 0.50  MFU 40.0%  3.2 GB  data wait 25%\n"
    )


@pytest.mark.parametrize("columns", [70, 200])
def test_a_terminal_has_one_line_that_begins_with_the_loss(
    columns: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    log = open_log(tmp_path, share=0.1)
    for step in range(1, 11):
        log.train(record(step, 0.25))
    log.close()

    # The final line, which has overwritten all earlier ones.
    shown = [text for text in capsys.readouterr().out.splitlines() if "loss" in text]
    last = shown[-1].split("\r")[-1]
    assert "10/25  loss 5.0000  0m04s left  1,024 tokens/s" in last
    assert ("data wait 25%" in last) == (columns == 200)


def test_the_console_omits_a_small_data_wait(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = console_text(tmp_path, capsys, 0.009, 1)
    assert "data wait" not in text
    assert "a device" not in text


def test_machine_fields_are_those_that_depend_on_the_machine(tmp_path: Path) -> None:
    log = open_log(tmp_path, share=0.1)
    log.train(replace(record(1), rank_times=RankTimes(1, 0.2, 0.1)))
    log.validation(1, MEASURED, 0.5)
    log.close()
    with_loss = {"step", "loss", "targets", "learning_rate", "gradient_norm", "tokens_seen"}

    trained, measured = read_metrics(tmp_path)
    assert set(trained) - with_loss == MACHINE_FIELDS - {"sample_s", "suite_s"}
    assert measured["sample_s"] == 0.5


def test_every_validation_is_on_the_console(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    log.validation(3, MEASURED)
    log.close()

    printed = capsys.readouterr().out
    assert "step 3/25  val loss 5.5000 nats/token, 2.0000 bits/byte over 7 tokens" in printed


def test_metrics_are_strict_json(run: Path) -> None:
    for line in (run / METRICS_NAME).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_metrics_of_an_earlier_version_are_refused_by_name(run: Path) -> None:
    path = run / METRICS_NAME
    path.write_text(path.read_text() + '{"step": 6, "left_out": true}\n')

    with pytest.raises(CheckpointCorruptError, match="is not of this version of megaback"):
        read_metrics(run)
