"""First start of a branch: its trunk's checkpoint, and the records that it continues.

From the branch's own first checkpoint on, it is resumed like any run, without the trunk.
"""

import json
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.errors import CheckpointCorruptError
from megaback.branches import BranchPoint
from megaback.checkpoints.checkpoint import CheckpointMeta, verify_together
from megaback.config import ALL_KEPT, Config
from megaback.distributed.world import World
from megaback.faults.start_fence import Fence
from megaback.faults.step_guard import guarded_steps, read_excluded_steps, write_skipped_steps
from megaback.run_folder import CHECKPOINTS_FOLDER, METRICS_NAME, SAMPLES_NAME
from megaback.tracking.metrics import read_metrics

Trunk = tuple[Path, CheckpointMeta]


def open_trunk(target: Path, world: World) -> Trunk:
    """Verify the checkpoint that a branch continues. Collective.

    Ends all ranks with a CheckpointCorruptError if it is damaged or has been deleted.
    """
    meta, problems = verify_together(target, world)
    if meta is None or problems:
        world.stop_if_any(
            CheckpointCorruptError(
                f"branch_from {target} does not verify: {' '.join(problems[0].split())}; give "
                "another checkpoint, and raise the trunk's checkpoint.keep_last if it was deleted"
            )
        )
    assert meta is not None
    return target, meta


def continue_records(config: Config, branch: BranchPoint, trunk: Trunk, fence: Fence) -> None:
    """Begin the records of a branch with those of its trunk that it continues.

    With all four parts kept, they are the lines of metrics.jsonl that the step guard compares with;
    with the same batches at the same steps, the steps that a rollback of the trunk excludes.
    """
    target, meta = trunk
    has_run = target.parent.name == CHECKPOINTS_FOLDER
    run = target.parent.parent if has_run else target.parent  # of copies, their location
    lines: list[dict[str, Any]] = []
    if branch.kept == ALL_KEPT and has_run and (run / METRICS_NAME).exists():
        lines = _guarded_lines(run, branch.trunk_step, config.guard.window_steps)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(config.run / METRICS_NAME, text, fence.replace)
    (config.run / SAMPLES_NAME).unlink(missing_ok=True)
    batch_rows = meta.config.get("batch", {}).get("global_batch_rows")
    is_same_order = branch.continues("data") and batch_rows == config.batch.global_batch_rows
    if branch.continues("schedule") and is_same_order:
        excluded = [one for one in read_excluded_steps(run) if one[1] > branch.step]
        if excluded:
            fence.check()
            write_skipped_steps(config.run, f"{json.dumps(excluded)}\n".encode())


def _guarded_lines(run: Path, step: int, window_steps: int) -> list[dict[str, Any]]:
    lines = read_metrics(run)
    num_lines = len(guarded_steps(lines, step, window_steps))
    steps = [line for line in lines if "loss" in line and line["step"] <= step]
    return steps[len(steps) - num_lines :]
