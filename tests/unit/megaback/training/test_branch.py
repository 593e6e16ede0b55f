"""Records that a branch continues: the guard's window and the excluded steps of its trunk."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaback.branches import BranchPoint
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.config import ALL_KEPT, Kept
from megaback.faults.start_fence import NO_FENCE
from megaback.faults.step_guard import read_excluded_steps
from megaback.tracking.metrics import read_metrics
from megaback.training.branch import continue_records
from tests.helpers.run_config import run_config

WIDE = {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2}
Continue = Callable[..., Path]


@pytest.fixture
def continued(tmp_path: Path, meta_at: Callable[..., CheckpointMeta]) -> Continue:
    """`continued(kept, **sections)`: the folder of a branch from step 10 of a trunk of 12 steps."""
    trunk = tmp_path / "trunk"
    target = trunk / "checkpoints/step-00000010"
    target.mkdir(parents=True)
    lines = [{"step": 0, "val_loss": 9.0}]
    lines += [{"step": step, "loss": float(step), "gradient_norm": 1.0} for step in range(1, 13)]
    (trunk / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (trunk / "skipped_steps.json").write_text("[[3, 4], [11, 12]]")

    def make(kept: Sequence[Kept], **sections: Any) -> Path:
        run = tmp_path / "branch"
        run.mkdir()
        config = run_config(run, branch_from=target, keep=kept, **sections)
        meta = replace(meta_at(10), config=run_config(trunk).model_dump(mode="json"))
        point = BranchPoint(
            checkpoint=str(target),
            sha256="0" * 64,
            trunk_step=10,
            kept=config.keep,
            step=10 if "schedule" in kept else 0,
            tokens=0,
            rows=0,
            order_rows=4,
            data_fingerprint="",
            text_format={},
        )
        continue_records(config, point, (target, meta), NO_FENCE)
        return run

    return make


def test_a_branch_of_everything_has_the_guards_window_of_its_trunk(continued: Continue) -> None:
    run = continued(ALL_KEPT, guard={"window_steps": 3})

    assert [line["step"] for line in read_metrics(run)] == [8, 9, 10]


@pytest.mark.parametrize("kept", [("weights",), ("optimizer", "schedule"), ("schedule", "data")])
def test_other_branches_begin_without_metrics(kept: Sequence[Kept], continued: Continue) -> None:
    assert read_metrics(continued(kept)) == []


@pytest.mark.parametrize(
    ("kept", "sections", "excluded"),
    [
        (ALL_KEPT, {}, [(11, 12)]),
        (("schedule", "data"), {}, [(11, 12)]),
        (("schedule",), {}, []),
        (("data",), {}, []),
        (ALL_KEPT, {"batch": WIDE}, []),
    ],
)
def test_excluded_steps_are_those_of_the_same_rows_at_the_same_steps(
    kept: Sequence[Kept],
    sections: dict[str, Any],
    excluded: list[tuple[int, int]],
    continued: Continue,
) -> None:
    assert read_excluded_steps(continued(kept, **sections)) == excluded
