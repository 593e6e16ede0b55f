"""Branches that are refused after a rollback of their trunk."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from megaback.faults.exit_record import record_event, record_start
from megaback.faults.rolled_back_branches import require_no_rolled_back_branch
from megaback.faults.run_state import ROLLBACK_EVENT
from tests.helpers.run_config import run_config


def test_a_branch_from_before_a_rollback_is_refused(tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e-3, "schedule": "wsd", "decay_at": [100 * 4 * 64]}
    config = run_config(tmp_path, optimizer=optimizer, training={"steps": 80})
    branch = tmp_path / "branches" / "2.56e4"
    branch.mkdir(parents=True)
    record_start(branch, step=80)
    record_event(tmp_path, ROLLBACK_EVENT, step=80, excluded=[81, 90])
    require_no_rolled_back_branch(config)

    record_event(tmp_path, ROLLBACK_EVENT, step=70, excluded=[71, 80])
    with pytest.raises(ConfigError, match="rolled back to step 70; move the branch"):
        require_no_rolled_back_branch(config)

    branch.rename(tmp_path / "old")
    require_no_rolled_back_branch(config)
