"""Runs that are looked at: as curves, as a page, and on one screen."""

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from megaback.faults.exit_record import record_exit, record_start
from megaback.run_folder import METRICS_NAME
from tools.plot import main as plot_command
from tools.run_views.curves import Curve, differences, names_of, read_curves
from tools.status import main as status_command

Steps = Callable[..., Path]
ROW_TOKENS = 2048


@pytest.fixture
def run_of(tmp_path: Path) -> Steps:
    """`run_of(name, steps)`: a folder as a run leaves it, stopped once and with a skipped step."""

    def write(name: str, steps: int, skipped: int = 5) -> Path:
        run = tmp_path / name
        run.mkdir()
        record_start(run, step=0, total_steps=100, world_size=2, zero_stage=1)
        record_exit(run, 75, "preempted", "SIGTERM came", 0)
        record_start(run, step=3, total_steps=100, world_size=4, zero_stage=2)
        lines: list[dict[str, Any]] = [{"step": 0, "val_loss": 9.0, "val_bits_per_byte": 4.0}]
        for step in range(1, steps + 1):
            lines.append(
                {
                    "step": step,
                    "loss": None if step == skipped else 9.0 - step / 100,
                    "targets": 2000,
                    "learning_rate": 0.001 * step,
                    "gradient_norm": None if step == skipped else 1.0,
                    "step_s": 0.5,
                    "tokens_seen": step * ROW_TOKENS,
                    "tokens_per_s": 2 * ROW_TOKENS,
                    **({"skipped": "the loss is nan"} if step == skipped else {}),
                }
            )
            if step % 10 == 0:
                by_context = {
                    name: {"loss": loss, "bits_per_byte": None, "targets": 9}
                    for name, loss in {"1": 9.0 - step / 100, "2": 8.0, "33-64": 7.0}.items()
                }
                measured = {"val_loss": 8.0, "val_bits_per_byte": 3.5}
                lines.append({"step": step, **measured, "val_by_context": by_context})
        (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return write


def test_curves_are_what_the_metrics_say(run_of: Steps) -> None:
    run = run_of("a", 20)
    by_step = read_curves(run, "step", "a")
    assert by_step.num_steps == 20
    assert by_step.loss.places.tolist() == [step for step in range(1, 21) if step != 5]
    assert by_step.loss.values[0] == 8.99
    assert by_step.val_loss.places.tolist() == [0, 10, 20]
    assert by_step.context_loss.places.tolist() == [1, 2, 64]
    assert by_step.context_loss.values.tolist() == [8.8, 8.0, 7.0]
    assert by_step.skipped.tolist() == [5]
    assert by_step.restarts.tolist() == [3]
    by_tokens = read_curves(run, "tokens", "a")
    assert by_tokens.val_loss.places.tolist() == [0, 10 * ROW_TOKENS, 20 * ROW_TOKENS]
    by_time = read_curves(run, "time", "a")
    assert by_time.restarts.tolist() == pytest.approx([1.5 / 3600])


@given(st.lists(st.floats(-10, 10), max_size=60), st.integers(1, 9))
def test_smoothing_is_the_mean_of_a_window(values: list[float], steps: int) -> None:
    curve = Curve(np.arange(len(values), dtype=float), np.array(values))
    found = curve.smoothed(steps)
    assert found.places.tolist() == curve.places.tolist()
    for stop in range(1, len(values) + 1):
        window = values[max(0, stop - steps) : stop]
        assert found.values[stop - 1] == pytest.approx(math.fsum(window) / len(window), abs=1e-9)


@given(st.integers(0, 9000))
def test_thinning_keeps_a_few_thousand_points_and_the_mean(points: int) -> None:
    curve = Curve(np.arange(points, dtype=float), np.arange(points, dtype=float))
    found = curve.thinned()
    assert len(found.values) <= min(points, 2000)
    assert found.values.tolist() == found.places.tolist()
    if points and points <= 2000:
        assert found is curve


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert names_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_what_differs_between_configs_is_found(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        text = f"run: {name}\nmodel: {{width: 32}}\noptimizer: {{learning_rate: {rate}}}\n"
        (tmp_path / name / "config.yaml").write_text(text)
    found = differences([tmp_path / "a", tmp_path / "b"])
    assert found == [("optimizer.learning_rate", ["1", "2"])]


def plot(*words: object) -> Result:
    return CliRunner().invoke(plot_command, [str(word) for word in words])


class _Loads(HTMLParser):
    """Whatever a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.found.append(tag)
        self.found += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_loads_nothing_and_says_what_the_runs_came_to(run_of: Steps, tmp_path: Path) -> None:
    runs = [run_of("<b>&", 20), run_of("second", 1), run_of("empty", 0)]
    result = plot(*runs, "--out", tmp_path / "curves", "--by", "tokens")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = _Loads()
    page.feed((tmp_path / "curves.html").read_text())
    assert page.found == []
    assert page.text.count("<b>&") >= 2  # as text
    assert "8.0000" in page.text
    before = (tmp_path / "curves.html").read_bytes(), (tmp_path / "curves.png").read_bytes()
    plot(*runs, "--out", tmp_path / "curves", "--by", "tokens")
    after = (tmp_path / "curves.html").read_bytes(), (tmp_path / "curves.png").read_bytes()
    assert after == before


def test_a_folder_stands_for_the_runs_below_it(run_of: Steps, tmp_path: Path) -> None:
    (tmp_path / "runs" / "arrow").mkdir(parents=True)
    runs = [run_of(f"runs/arrow/{name}", 20) for name in ("backward", "forward")]
    (run_of("runs/arrow/queued", 0) / METRICS_NAME).unlink()
    pages = []
    for words in (runs, [tmp_path / "runs"]):
        result = plot(*words, "--out", tmp_path / "curves", "--overwrite")
        assert result.exit_code == 0, result.output
        pages.append((tmp_path / "curves.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 40, "holds no run"),
        ("", 40, "no step is done yet"),
        ('{"step": 1, "learning_rate": 1}\n', 41, "not of this version"),
        ('["step"]\n', 41, "not of this version"),
        ('{"step": 1, "lo', 40, "no step is done yet"),
    ],
)
def test_a_folder_with_nothing_to_draw_gives_one_sentence(
    text: str | None, code: int, message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / METRICS_NAME).write_text(text)
    result = plot(run, "--out", tmp_path / "curves")
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def status(run: Path, *options: str) -> Result:
    return CliRunner().invoke(status_command, [str(run), *options])


def test_the_screen_says_where_a_run_stands_and_how_it_got_there(run_of: Steps) -> None:
    run = run_of("a", 20)
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "meta.json").write_text("{}")
    record_exit(run, 51, "rank lost", "rank 3 is gone", 0)

    result = status(run)

    assert result.exit_code == 0, result.output
    for part in (
        "stopped: exit code 51 (rank lost): rank 3 is gone",
        f"20 of 100 (20.0%), {20 * ROW_TOKENS:,} tokens",
        "val loss   8.0000 nats/token, 3.5000 bits/byte at step 20; lowest 8.0000 at step 10",
        "0m40s of training, once it goes on",
        "step 10, 0m",
        "1 step; the last is 5: the loss is nan",
        "started at step 0 on 2 ranks, ZeRO 1",
        "ended with code 75 (preempted): SIGTERM came",
        "started at step 3 on 4 ranks, ZeRO 2",
    ):
        assert part in result.output, result.output
    fields = json.loads(status(run, "--json").output)
    assert fields["skipped"] == {"5": "the loss is nan"}
    assert fields["left_s"] == 40.0
    assert len(fields["history"]) == 4


def test_data_wait_is_that_of_the_time_and_is_told_where_it_matters(run_of: Steps) -> None:
    run = run_of("a", 4)
    lines = [json.loads(text) for text in (run / METRICS_NAME).read_text().splitlines()]
    for line, share, taken_s in zip(lines[1:], (0.0, 0.0, 0.5, 0.01), (1, 1, 2, 6), strict=True):
        line |= {"data_wait_share": share, "step_s": taken_s, "memory_peak_bytes": 2_500_000_000}
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    pace = f"pace       {2 * ROW_TOKENS:,} tokens/s"

    assert f"{pace}, data wait 11%, 2.5 GB\n" in status(run).output
    assert json.loads(status(run, "--json").output)["data_wait_share"] == pytest.approx(0.106)
    assert f"{pace}\n" in status(run_of("older", 4)).output


def test_a_run_that_is_finished_has_nothing_left(run_of: Steps) -> None:
    run = run_of("a", 100)
    record_exit(run, 0, "finished", "trained to the end", 0)
    assert json.loads(status(run, "--json").output)["left_s"] == 0
    assert "\n  left" not in status(run).output


@pytest.mark.parametrize(
    ("metrics", "code", "message"),
    [(None, 0, "step       0"), ("", 0, "step       0"), ('{"step": "x"}\n', 41, "version")],
)
def test_a_run_that_has_hardly_begun_or_is_of_another_version(
    metrics: str | None, code: int, message: str, tmp_path: Path
) -> None:
    record_start(tmp_path, step=0)
    if metrics is not None:
        (tmp_path / METRICS_NAME).write_text(metrics)
    result = status(tmp_path)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert status(tmp_path / "nowhere").exit_code == 40
