"""Branches in the tree of a run: their curves continue those of their trunk."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from megaback.tracking.run_progress import runs_below
from tests.helpers.runs import ROW_TOKENS, add_branch, finished_steps
from tools.plot import main as plot_command
from tools.run_views.branch_tree import TreeRun
from tools.run_views.curves import names_in_tree, read_curves
from tools.watch import main as watch_command


@pytest.fixture
def trunk(tmp_path: Path) -> Path:
    """A run of 40 steps with a branch at step 20, and a branch of that with a new schedule."""
    run = finished_steps(tmp_path / "big", 40)
    branch = add_branch(run, "100", at=20, steps=5)
    add_branch(branch, "other", at=25, steps=4, kept=["weights", "optimizer"])
    return run


def test_a_branch_continues_the_steps_tokens_and_time_of_its_trunk(trunk: Path) -> None:
    root, branch, other = TreeRun(trunk).with_branches()

    assert names_in_tree([root, branch, other]) == ["big", "big/100", "big/100/other"]
    by_step = [read_curves(run, "step", "") for run in (branch, other)]
    assert [curves.begins for curves in by_step] == [20, 25]
    assert [curves.num_steps for curves in by_step] == [5, 4]
    assert [curves.step for curves in by_step] == [25, 4]
    assert by_step[0].loss.since(20.5).places.tolist() == [21, 22, 23, 24, 25]
    assert by_step[1].loss.since(25.5).places.tolist() == [26, 27, 28, 29]
    assert by_step[1].val_loss.places.tolist() == [29]
    by_tokens = read_curves(other, "tokens", "")
    assert by_tokens.begins == 25 * ROW_TOKENS
    assert by_tokens.loss.places[-1] == 29 * ROW_TOKENS
    by_time = read_curves(other, "time", "")
    assert by_time.begins == pytest.approx((20 * 0.5 + 5) / 3600)


def test_a_moving_mean_begins_with_the_steps_of_the_trunk(trunk: Path) -> None:
    _, branch, _ = TreeRun(trunk).with_branches()
    curves = read_curves(branch, "step", "")

    mean = curves.loss.smoothed(4).since(curves.begins)

    trunk_losses = [9.0 - step / 100 for step in (18, 19, 20)]
    assert mean.places[1] == 21
    assert mean.values[1] == pytest.approx(np.mean([*trunk_losses, 5.0]))


def test_a_branch_by_itself_begins_with_what_its_own_metrics_have(trunk: Path) -> None:
    curves = read_curves(trunk / "branches/100", "step", "")

    assert curves.begins == 0
    assert curves.loss.places.tolist() == [18, 19, 20, 21, 22, 23, 24, 25]


def test_a_picture_has_each_branch_once(trunk: Path, tmp_path: Path) -> None:
    words = [trunk, trunk / "branches/100", "--out", tmp_path / "curves"]
    result = CliRunner().invoke(plot_command, [str(word) for word in words])

    assert result.exit_code == 0, result.output
    page = (tmp_path / "curves.html").read_text()
    assert page.count("</i>big/100/other</td>") == 1
    assert page.count("</i>100</td>") == 0


def test_links_to_a_run_from_its_own_branches_end(trunk: Path) -> None:
    (trunk / "branches/loop").symlink_to(trunk)

    found = [run.path.name for run in TreeRun(trunk).with_branches()]

    assert found == ["big", "100", "other"]


def test_watch_counts_the_states_of_branches(trunk: Path) -> None:
    text = CliRunner().invoke(watch_command, [str(trunk)])
    fields = json.loads(CliRunner().invoke(watch_command, [str(trunk), "--json"]).output)

    assert "; branches: 2 finished\n" in text.output
    assert fields["branches"] == {
        "branches/100": "finished",
        "branches/100/branches/other": "finished",
    }


def test_runs_below_a_folder_are_followed_by_their_branches(trunk: Path) -> None:
    found = [str(run.relative_to(trunk.parent)) for run in runs_below(trunk.parent)]

    assert found == ["big", "big/branches/100", "big/branches/100/branches/other"]
