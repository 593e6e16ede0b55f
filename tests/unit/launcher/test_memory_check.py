"""A run that cannot fit is refused before it is queued, if its devices are known."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, NotEnoughMemoryError
from launcher.memory_check import check_memory, gpus_of_partition, largest_device
from megaback.config import Config
from megaback.config_file import load_config
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"


def config_of(*overrides: str) -> Config:
    return load_config(CONFIGS / "reverse_7b.yaml", overrides)


def put_sinfo(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this shell script the first `sinfo` on the PATH."""
    path = folder / "sinfo"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def check(config: Config, nodes: int = 2, **options: str | None) -> str:
    named = {"device_name": None, "partition": None, **options}
    return check_memory(config, nodes, 8, uses_gpus=True, **named)


def test_the_memory_of_a_run_that_fits_is_reported() -> None:
    said = check(config_of(), device_name="h100-80gb")

    assert said.startswith("memory: ")
    assert "of the 80 of h100-80gb" in said


def test_a_run_that_cannot_fit_is_refused_with_a_change_that_fits() -> None:
    with pytest.raises(NotEnoughMemoryError, match="the smallest change that fits is"):
        check(config_of("hardware.device_name=a100-40gb"), nodes=1)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown device 'h1'"):
        check(config_of(), device_name="h1")


def test_the_type_of_a_partitions_gpus_is_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sinfo(tmp_path, "echo 'cpu*|(null)'; echo 'gpu|gpu:l4:8(S:0-1)'", monkeypatch)

    with pytest.raises(NotEnoughMemoryError, match="l4-24gb"):
        check(config_of(), partition="gpu")


def test_a_type_of_several_sizes_counts_as_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sinfo(tmp_path, "echo 'gpu*|gpu:a100:8'; echo 'other|gpu:l4:1'", monkeypatch)

    assert "of the 80 of a100-80gb (the largest that a100 may be in Slurm)" in check(config_of())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'gpu*|gpu:8'", "does not name the type"),
        ("echo 'gpu*|gpu:tesla:8'", "the GPU type tesla is unknown"),
        ("echo 'cpu*|(null)'", "names no GPUs"),
        ("echo no such partition >&2; exit 1", "sinfo failed: no such partition"),
    ],
)
def test_the_reason_for_a_skipped_check_is_reported(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_sinfo(tmp_path, script, monkeypatch)

    said = check(config_of())

    assert "not checked" in said
    assert reason in said
    assert said.endswith("give --device-name")


def test_without_slurm_the_check_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert gpus_of_partition(None) == (set(), "sinfo is not installed")


def test_without_gpus_the_check_is_skipped() -> None:
    said = check_memory(config_of(), 1, 1, uses_gpus=False, device_name="l4-24gb", partition=None)

    assert "requests no GPUs" in said


def test_one_unknown_type_among_others_leaves_the_device_unknown() -> None:
    assert largest_device({"h100", "tesla"}) is None
