"""Every config of configs/ is planned as it is, and trains two steps when its sizes are small."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from launcher.plan import main as plan
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import curve_of, metrics_of
from tests.helpers.warm_ranks import WarmRanks
from tools.new import main as new

pytestmark = pytest.mark.slow

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = (
    *("model.num_layers=2", "model.width=32", "model.num_heads=4", "model.num_kv_heads=2"),
    *("model.mlp_width=null", "batch.context_tokens=64", "batch.global_batch_rows=4"),
    *("batch.micro_batch_rows=2", "training.steps=2", "training.epochs=null"),
    *("optimizer.warmup_steps=1", "hardware.device=cpu", "hardware.processes=1"),
)
"""Sizes alone: what a config trains with, and how, stays."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_is_planned(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    nodes = 1 if "hardware" in fields else 8  # which says that it is for CPUs
    words = ["--nodes", str(nodes), "--device-name", "h100-80gb", "--training-tokens", "1e10"]
    shape = () if "model" in fields else SMALL[:3]  # else its base's

    result = CliRunner().invoke(plan, [str(path), *words, *shape, "hardware.device=cuda"])

    assert result.exit_code == 0, result.output
    assert "memory" in result.output


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_trains(
    path: Path,
    tmp_path: Path,
    tiny_shards: Path,
    warm_ranks: Callable[[int], WarmRanks],
    lonely_run_of: Callable[..., Path],
    model_of: Callable[[Path], Path],
) -> None:
    run = tmp_path / "run"
    overrides = [*SMALL, f"run={run}", f"data.shards={tiny_shards}"]
    if "init_from" in yaml.safe_load(path.read_text()):
        overrides += [f"init_from={model_of(lonely_run_of('zero.stage=1'))}"]

    warm_ranks(1).train(path, overrides, tmp_path / "output.txt")

    assert len(curve_of(run)) == 2
    assert [line["step"] for line in metrics_of(run) if "val_loss" in line] == [0, 2]


def test_a_new_config_trains(
    tmp_path: Path, tiny_shards: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    config, run = tmp_path / "new.yaml", tmp_path / "run"
    words = ["--flops", "3e10", "--parameters", "200k", "--shards", str(tiny_shards)]
    result = CliRunner().invoke(new, [*words, "--out", str(config)])
    assert result.exit_code == 0, result.output

    overrides = [f"run={run}", "training.steps=2", "batch.global_batch_rows=4"]
    warm_ranks(1).train(config, overrides, tmp_path / "output.txt")

    assert len(curve_of(run)) == 2
