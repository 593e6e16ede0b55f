"""Untrusted run folders: every command shows them or reports an error, within bounds."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import CheckpointCorruptError, ConfigError, MegabackError
from launcher.slurm.job import true_code
from launcher.slurm.jobs import rows_of_run
from megaback.config_file import load_config
from megaback.faults.exit_record import read_exit, read_history
from megaback.faults.heartbeat import read_heartbeats
from megaback.faults.run_ownership import is_run_of_ours, place_of_config
from megaback.run_folder import (
    EXIT_NAME,
    HISTORY_NAME,
    METRICS_NAME,
    heartbeat_path,
    newest_checkpoint_step,
)
from megaback.tracking.metrics import read_metrics
from megaback.tracking.run_progress import read_progress, read_submissions, runs_below
from megaback.yaml_text import read_yaml, read_yaml_file
from tests.helpers.hostile_files import bounded
from tools.plot import draw
from tools.plot import main as plot_command
from tools.run_views.branch_tree import TreeRun
from tools.run_views.curves import read_curves
from tools.status import screen, status_of
from tools.watch import health_of

_STARTED = {"event": "start", "step": 0, "total_steps": 9, "world_size": 1, "time": 1.7e9}
_ENDED = {"code": 75, "kind": "PreemptedError", "reason": "asked to stop", "time": 1.7e9}
_STEP = {
    "step": 1,
    "loss": 2.0,
    "targets": 10,
    "learning_rate": 1e-3,
    "gradient_norm": 1.0,
    "step_s": 0.5,
    "data_wait_share": 0.1,
    "memory_peak_bytes": 1000,
    "tokens_seen": 64,
    "tokens_per_s": 128.0,
    "tokens_per_s_per_device": 128.0,
}
_MEASURED = {
    "step": 1,
    "val_loss": 2.0,
    "val_bits_per_byte": 1.0,
    "val_targets": 10,
    "val_by_context": {"1": {"loss": 2.0, "bits_per_byte": 1.0, "targets": 10}},
}
_BEAT = {
    "rank": 0,
    "world_size": 1,
    "host": "somewhere",
    "pid": 7,
    "pid_started": 1.7e9,
    "phase": "updating",
    "step": 1,
    "since": 1.7e9,
    "written": 1.7e9,
    "interval_s": 10.0,
    "timeout_s": 300.0,
    "exit_reason": None,
}
_WRITTEN = {HISTORY_NAME: _STARTED, EXIT_NAME: _ENDED, METRICS_NAME: _STEP}
_PLACES = (*_WRITTEN, "heartbeats/rank-00000.json")


def write_run(run: Path, **changed: object) -> Path:
    """A run that has taken a step; `changed` replaces the contents of its files."""
    (run / "heartbeats").mkdir(parents=True, exist_ok=True)
    (run / HISTORY_NAME).write_text(json.dumps(changed.get("history", _STARTED)) + "\n")
    (run / EXIT_NAME).write_text(json.dumps(changed.get("ending", _ENDED)))
    metrics = (changed.get("trained", _STEP), changed.get("measured", _MEASURED))
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in metrics))
    heartbeat_path(run, 0).write_text(json.dumps(changed.get("beat", _BEAT)))
    return run


def errors_on(run: Path) -> list[MegabackError]:
    """The errors that commands report for a run; any other exception is a failure."""
    now = time.time()
    reads: tuple[Callable[[], object], ...] = (
        lambda: health_of(run, now),
        lambda: screen(status_of(run, now), now),
        lambda: read_curves(run, "time", "run"),
        lambda: rows_of_run(run),
        lambda: true_code(run, "7", 1),
    )
    found = []
    for one in reads:
        try:
            one()
        except MegabackError as error:
            found.append(error)
    return found


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**30), 1 << 63, 1e308, "9" * 50]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def _mutated(record: dict[str, Any]) -> st.SearchStrategy[object]:
    changes = st.dictionaries(st.sampled_from(sorted(record)), _VALUES, min_size=1, max_size=2)
    return _VALUES | changes.map(lambda changed: {**record, **changed})


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    changed=st.fixed_dictionaries(
        {},
        optional={
            "history": _mutated(_STARTED),
            "ending": _mutated(_ENDED),
            "trained": _mutated(_STEP),
            "measured": _mutated(_MEASURED),
            "beat": _mutated(_BEAT),
        },
    )
)
def test_any_record_is_shown_or_refused(
    changed: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    errors_on(write_run(tmp_path_factory.mktemp("mutated") / "run", **changed))


def test_an_intact_run_is_read_without_errors(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert errors_on(run) == []
    assert (len(read_history(run)), len(read_heartbeats(run)), len(read_metrics(run))) == (1, 1, 2)
    assert read_exit(run) == _ENDED


@pytest.mark.parametrize("name", _PLACES)
def test_lines_without_an_end_are_not_read(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / name).open("wb") as file:
        file.truncate(8 << 30)
    with bounded():
        problems = errors_on(run)
    is_metrics = name == METRICS_NAME
    assert all(
        ("line 1 has more than 1,048,576 bytes" in str(one)) == is_metrics for one in problems
    )


@pytest.mark.parametrize("name", _PLACES)
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_pipes_and_devices_are_not_read(kind: str, name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to(kind)
    with bounded():
        errors_on(run)
        is_run_of_ours(run)
        read_progress(run)


def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("step-²", "step-", "step-00000007", "step-9" * 20, "step--0000008"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "meta.json").touch()
    assert newest_checkpoint_step(run) == 7
    assert errors_on(run) == []


@pytest.mark.parametrize("jobs", [7, [7], [{}], {"job": 1}, [{"job": [1], "stage": {}}], None])
def test_a_submission_is_read_or_skipped(jobs: object, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "submitted" / "20260101-000000").mkdir(parents=True)
    (run / "submitted/20260101-000000/submission.json").write_text(json.dumps({"jobs": jobs}))
    assert all(isinstance(job["job"], str) for one in read_submissions(run) for job in one["jobs"])
    rows_of_run(run)


@pytest.mark.parametrize("name", [HISTORY_NAME, METRICS_NAME])
def test_a_flood_of_lines_is_not_kept(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    line = json.dumps(_STARTED if name == HISTORY_NAME else {"step": 7}).encode() + b"\n"
    with (run / name).open("ab") as file:
        for _ in range(100):
            file.write(line * 10_000)
    with bounded(3):
        assert len(read_history(run)) < 40_000
        assert health_of(run).state == "stopped"
        rows_of_run(run)


def test_each_folder_is_visited_once_despite_links(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"a{number}").symlink_to(".")
    run = write_run(tmp_path / "deep" / "run")
    (tmp_path / "link").symlink_to(run)
    with bounded():
        assert list(runs_below(tmp_path)) == [run]


@pytest.mark.parametrize("name", [r"$\frac{$", "<svg onload=alert(1)>", "\x1b[2J"])
def test_names_of_runs_are_escaped_in_plots(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / name)
    (run / HISTORY_NAME).write_text(f"{json.dumps(_STARTED)}\n" * 3000)
    with bounded(5):
        draw([TreeRun(run)], tmp_path / "curves", "step", None, log=False)
    assert "<svg onload" not in (tmp_path / "curves.html").read_text()


@pytest.mark.parametrize("bucket", ["1-" + "9" * 300, "0", str(1 << 30), ""])
def test_a_context_that_no_model_has_is_not_drawn(bucket: str, tmp_path: Path) -> None:
    one = {"loss": 2.0, "bits_per_byte": 1.0, "targets": 1}
    run = write_run(tmp_path / "run", measured={**_MEASURED, "val_by_context": {bucket: one}})
    with pytest.raises(CheckpointCorruptError):
        draw([TreeRun(run)], tmp_path / "curves", "step", None, log=False)


def test_a_plot_of_hostile_metrics_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trained={**_STEP, "loss": "high"})
    result = CliRunner().invoke(plot_command, [str(run), "--out", str(tmp_path / "plot.png")])
    assert result.exit_code == 41, result.output
    assert "line 1 is not a line of metrics" in result.output


# Configs.

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 30)
)
_MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}]}}\n"
    for number in range(1, 30)
)
YAML: dict[str, tuple[str, str]] = {
    "aliases of aliases": (_LAUGHS, "more than 20,000 values"),
    "merges of merges": (_MERGES, "more than 20,000 values"),
    "an alias of itself": ("a: &a [*a]", "an alias to a node that contains it"),
    "many values": ("[" + "1," * 100_000 + "]", "more than 20,000 values"),
    "many lines": ("".join(f"k{number}: 1\n" for number in range(20_000)), "more than 20,000"),
    "nesting": ("a: " + "[" * 50_000, "nested too deeply"),
    "nested blocks": ("".join(" " * n + "a:\n" for n in range(500)), "nested too deeply"),
    "a long text": ("a: " + "x" * (1 << 19), "more than 262,144"),
    "an invalid date": ("run: 2024-99-99", "month"),
    "an invalid time": ("run: 2001-12-14t21:59:43.10-99:30", "offset"),
    "a number of 5,000 digits": ("run: " + "9" * 5000, "4300 digits"),
    "no text": ("a: \0", "special characters"),
    "an object": ("a: !!python/object/apply:os.system [id]", "constructor"),
}


@pytest.mark.parametrize(("text", "said"), YAML.values(), ids=YAML)
def test_a_hostile_config_is_refused_at_once(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with bounded(), pytest.raises(ConfigError, match=said) as error:
        load_config(path)
    assert len(str(error.value)) < 700


def test_yaml_aliases_and_merge_keys_are_resolved(tmp_path: Path) -> None:
    assert read_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


def test_a_config_may_come_through_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"run: x\n")
    os.close(writer)
    with pytest.raises(ConfigError, match="the key data is missing"):
        load_config(Path(f"/dev/fd/{reader}"))
    os.close(reader)
    with bounded(), pytest.raises(ConfigError):
        load_config(Path("/dev/zero"))


def test_the_config_in_a_runs_folder_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(OSError, match="not a regular file"):
        read_yaml_file(tmp_path / "config.yaml")
    assert place_of_config(tmp_path, None) == tmp_path / "config.resolved.yaml"


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text("abmr:-[]{}&*!<>|?, \n'\"#%0123456789.=", max_size=60))
def test_any_text_is_refused_as_a_config_without_a_crash(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path)
