"""A third-party run with symbolic links in place of files that megaback writes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from megaback.checkpoints.checkpoint import read_meta
from megaback.run_folder import complete_checkpoints

pytestmark = pytest.mark.slow

WRITTEN = [
    *("metrics.jsonl", "config.resolved.yaml", "exit.json", "preflight.json"),
    *("checkpoints/latest", "heartbeats/rank-00000.json", "checkpoints/step-00000004"),
]


def test_a_resumed_run_writes_nothing_through_links(
    tmp_path: Path,
    tiny_shards: Path,
    train_one_rank: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    options = (f"data.shards={tiny_shards}", "validation.every_steps=null")
    assert train_one_rank(run, *options, "training.steps=2").returncode == 0
    (run / "config.yaml").write_text("# edited, so that config.resolved.yaml is written\n")
    mine.write_text("mine")
    for name in WRITTEN:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine)

    result = train_one_rank(run, *options, "training.steps=4")

    assert result.returncode == 0, result.stderr
    assert mine.read_text() == "mine"
    assert not any((run / name).is_symlink() for name in WRITTEN if name != "preflight.json")
    assert [read_meta(target).step for target in complete_checkpoints(run)][-1] == 4

    (run / ".lock").unlink()
    (run / ".lock").symlink_to(mine)
    result = train_one_rank(run, *options, "training.steps=6")
    assert (result.returncode, mine.read_text()) == (StorageError.exit_code, "mine")
    assert "symbolic link" in result.stderr
