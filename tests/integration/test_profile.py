"""`megaback profile` on real ranks: time by part, a trace, and nothing else."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, OutputExistsError, ShardsMissingError
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow


def profiled(
    config: Path, out: Path, *words: str, code: int = 0
) -> "subprocess.CompletedProcess[str]":
    ended = subprocess.run(
        [sys.executable, "-m", "megaback", "profile", config, "--out", out, *words],
        env=training_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        cwd=config.parent,
    )
    assert ended.returncode == code, ended.stderr
    return ended


def test_a_rank_of_a_sharded_run_is_profiled(tmp_path: Path, config_path: Path) -> None:
    out = tmp_path / "deep" / "profile"
    words = ("zero.stage=3", "--rank", "1", "--steps", "2", "--json", f"run={tmp_path / 'run'}")

    found = json.loads(profiled(config_path, out, *words).stdout)

    assert (found["rank"], found["world_size"], found["steps"]) == (1, 2, 2)
    cpu_s = {(one["phase"], one["part"]): one["cpu_s"] for one in found["parts"]}
    assert all(cpu_s["forward", part] > 0 for part in ("attention", "matrix products"))
    assert cpu_s["forward", "head and loss"] > 0
    assert cpu_s["forward", "communication"] > 0  # of stage 3's weights
    assert {phase for phase, _ in cpu_s} >= {"data", "forward", "backward", "optimizer"}
    assert 0.3 < sum(cpu_s.values()) / found["step_s"] < 2
    assert json.loads((out / "profile.json").read_text()) == found
    names = {event.get("name") for event in trace_of(out)}
    assert names >= {"megaback:forward", "aten::mm", "[memory]"}
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "trace.json.gz"]
    assert not (tmp_path / "run").exists()
    # An earlier result is replaced only on request.
    assert "earlier result" in profiled(config_path, out, code=OutputExistsError.exit_code).stderr


def trace_of(out: Path) -> list[dict[str, object]]:
    with gzip.open(out / "trace.json.gz", "rt") as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--rank", "2"), ConfigError.exit_code, "there are 2 ranks"),
        (("data.shards=missing",), ShardsMissingError.exit_code, "missing"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_ranks_start(
    tmp_path: Path, config_path: Path, words: tuple[str, ...], code: int, text: str
) -> None:
    assert text in profiled(config_path, tmp_path / "out", *words, code=code).stderr
    assert not (tmp_path / "out").exists()


def test_data_that_is_too_short_for_a_horizon_is_refused(
    tmp_path: Path, config_path: Path, tiny_shards: Path
) -> None:
    shards = json.dumps([{"path": str(tiny_shards), "max_epochs": 1}])
    horizon = ("optimizer.schedule=wsd", "optimizer.decay_at=[1e9]", "training.steps=null")

    result = profiled(
        config_path,
        tmp_path / "out",
        f"data.shards={shards}",
        *horizon,
        code=ConfigError.exit_code,
    )

    assert "optimizer.decay_at: 1e9 tokens are" in result.stderr


def test_the_folder_of_others_is_kept(tmp_path: Path, config_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    profiled(config_path, tmp_path, code=OutputExistsError.exit_code)

    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
