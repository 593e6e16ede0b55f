"""`megaback status`: progress, history and expected end of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from megaback.faults.exit_record import record_exit, record_start
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics
from tests.helpers.runs import (
    ROW_TOKENS,
    add_branch,
    add_directions,
    add_suites,
    finished_steps,
    suite_metric,
)
from tools.status import main as status_command

Steps = Callable[..., Path]


@pytest.fixture
def run_of(tmp_path: Path) -> Steps:
    """`run_of(name, steps)`: folder of a finished run with one restart and one skipped step."""
    return lambda name, steps: finished_steps(tmp_path / name, steps)


def status(run: Path, *options: str) -> Result:
    return CliRunner().invoke(status_command, [str(run), *options])


def test_the_screen_shows_progress_and_history(run_of: Steps) -> None:
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
        "0m40s of training after a resume",
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


def test_suites_are_those_of_the_last_measurement(run_of: Steps) -> None:
    run = run_of("a", 4)
    suites = {
        "sciq": {"acc": suite_metric(0.5), "acc_norm": suite_metric(0.4)},
        "lambada": {"bits_per_byte": suite_metric(1.25, None)},
    }
    add_suites(run, {2: {"sciq": {"acc": suite_metric(0.3)}}, 4: suites})

    expected = "suites     sciq 0.500 (chance 0.250), lambada 1.250 at step 4"
    assert expected in status(run).output
    assert json.loads(status(run, "--json").output)["suites"] == {"step": 4, "suites": suites}


def test_a_model_of_both_directions_has_their_losses_apart(run_of: Steps) -> None:
    run = run_of("a", 20)
    add_directions(run, {20: (8.1, 7.9)})

    expected = "val loss   8.0000 nats/token (backward 8.1000, forward 7.9000), 3.5000 bits/byte"
    assert expected in status(run).output
    fields = json.loads(status(run, "--json").output)["validation"]
    assert fields["by_direction"] == {"backward": 8.1, "forward": 7.9}


def test_a_changing_mixture_has_the_shares_of_the_last_steps(run_of: Steps) -> None:
    run = run_of("a", 80)
    lines = read_metrics(run)
    for line in lines:
        if "learning_rate" in line:
            rows = {"web": 8, "books": 0} if line["step"] < 55 else {"web": 2, "books": 6}
            line["by_data_set"] = {name: {"rows": count} for name, count in rows.items()}
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))

    # Of the last 50 steps, 24 are before the change.
    assert "data       web 61.0%, books 39.0% of the last steps' rows" in status(run).output
    assert json.loads(status(run, "--json").output)["data_shares"] == {"web": 0.61, "books": 0.39}


def test_data_wait_is_a_share_of_time_and_is_shown_if_large(run_of: Steps) -> None:
    run = run_of("a", 4)
    lines = [json.loads(text) for text in (run / METRICS_NAME).read_text().splitlines()]
    for line, share, taken_s in zip(lines[1:], (0.0, 0.0, 0.5, 0.01), (1, 1, 2, 6), strict=True):
        line |= {"data_wait_share": share, "step_s": taken_s, "memory_peak_bytes": 2_500_000_000}
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    pace = f"pace       {2 * ROW_TOKENS:,} tokens/s"

    assert f"{pace}, data wait 11%, 2.5 GB\n" in status(run).output
    assert json.loads(status(run, "--json").output)["data_wait_share"] == pytest.approx(0.106)
    assert f"{pace}\n" in status(run_of("older", 4)).output


def test_a_finished_run_has_no_time_left(run_of: Steps) -> None:
    run = run_of("a", 100)
    record_exit(run, 0, "finished", "trained to the end", 0)
    assert json.loads(status(run, "--json").output)["left_s"] == 0
    assert "\n  left" not in status(run).output


def test_branches_are_a_tree_of_runs(run_of: Steps) -> None:
    run = run_of("a", 40)
    branch = add_branch(run, "100", at=20, steps=5)
    add_branch(branch, "other", at=25, steps=4, kept=["weights"])
    add_branch(run, "200", at=30, steps=10)

    lines = status(run).output.splitlines()

    at = lines.index("branches")
    assert lines[at + 1 : at + 6] == [
        "  a: dead, step 40 of 100, val loss 8.0000",
        "  ├─ 100 from step 20: finished, step 25 of 25, val loss 4.5000",
        "  │  └─ other from step 25: finished, step 4 of 4, val loss 4.5000",
        "  └─ 200 from step 30: finished, step 40 of 40, val loss 4.5000",
        "history",
    ]
    first, second = json.loads(status(run, "--json").output)["branches"]
    assert first["departure"]["step"] == 20
    assert first["branches"][0]["health"]["state"] == "finished"
    assert second["branches"] == []
    alone = status(branch).output
    assert f"branch     of {run}/checkpoints/step-00000020, step 20" in alone
    assert "  └─ other from step 25" in alone


@pytest.mark.parametrize(
    ("metrics", "code", "message"),
    [(None, 0, "step       0"), ("", 0, "step       0"), ('{"step": "x"}\n', 41, "version")],
)
def test_runs_without_steps_or_of_another_version(
    metrics: str | None, code: int, message: str, tmp_path: Path
) -> None:
    record_start(tmp_path, step=0)
    if metrics is not None:
        (tmp_path / METRICS_NAME).write_text(metrics)
    result = status(tmp_path)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert status(tmp_path / "nowhere").exit_code == 40
