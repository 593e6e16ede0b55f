"""Arrays of jobs on a real Slurm: shards, and instructions for texts."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from tests.helpers.models import write_chat_model
from tests.helpers.paths import ROOT
from tests.helpers.small_cluster import MINISLURM, Slurm, read_log, wait_for

_ELEMENTS = 6
_AT_A_TIME = 4
_SLOW_LEVEL = 22  # compressing takes seconds, so that a node can die in the middle of it


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for each element, of incompressible words."""
    folder = tmp_path_factory.mktemp("long")
    generator = random.Random(8)
    for number in range(_ELEMENTS):
        with (folder / f"{number}.jsonl").open("w") as file:
            for _ in range(300):
                words = (f"{generator.getrandbits(24):x}" for _ in range(600))
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return folder


@pytest.mark.cluster
@pytest.mark.slow
def test_an_array_that_loses_a_node_writes_the_manifest_of_a_single_process(
    slurm: Slurm,
    long_source: Path,
    tokenizer_path: Path,
    codec: Callable[..., TextCodec],
    tmp_path: Path,
) -> None:
    shards = tmp_path / "shards"
    job_id = slurm.submit(
        "build_shards.sbatch",
        *("--source", long_source, "--tokenizer", tokenizer_path, "--out", shards),
        *("--compression-level", _SLOW_LEVEL),
        cwd=tmp_path,
        options=f"--array=0-{_ELEMENTS - 1}%{_AT_A_TIME} --mem-per-cpu=30000",  # two per node
    )

    def finished() -> int:
        return len(list(shards.glob(".build/task-*.json")))

    def runs_on_second_node() -> bool:
        nodes = slurm.command("squeue", "--noheader", "--states=RUNNING", "--format=%N")
        return "n2" in nodes.split()

    wait_for(
        lambda: finished() > 0 and runs_on_second_node(),
        60,
        lambda: read_log(tmp_path, job_id),
    )
    assert finished() < _ELEMENTS
    slurm.command("bash", MINISLURM, "crash", "n2")
    try:
        slurm.require_completed(job_id, tmp_path)
        restarts = [int(element["Restarts"]) for element in slurm.elements(job_id)]
        assert max(restarts) > 0, "nothing ran on the node that died"
    finally:
        slurm.command("bash", MINISLURM, "up")  # for the tests that follow

    settings = BuildSettings(
        (WeightedSource(str(long_source)),),
        codec().format.tokenizer_sha256,
        compression_level=_SLOW_LEVEL,
    )
    alone, _ = build_shards(settings, codec(), tmp_path / "alone", workers=2, num_tasks=_ELEMENTS)
    assert Manifest.load(shards) == alone


@pytest.mark.cluster
@pytest.mark.slow
def test_an_array_writes_the_instructions_of_a_single_process(
    slurm: Slurm, codec: Callable[..., TextCodec], tmp_path: Path
) -> None:
    model = write_chat_model(tmp_path / "model", codec(), context_tokens=64)
    texts = [{"text": f"{word} {number}"} for word in ("sea", "map") for number in range(40)]
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps(text) + "\n" for text in texts))
    arguments = (model, "--in", source, "--max-new-tokens", 12, "--temp", 1, "--out")

    job_id = slurm.submit(
        *("backtranslate.sbatch", *arguments, tmp_path / "array.jsonl"),
        cwd=tmp_path,
        options="--array=0-3%4 --cpus-per-task=1 --mem-per-cpu=4G",
    )
    slurm.require_completed(job_id, tmp_path)

    alone = [sys.executable, "-m", "tools.backtranslate", *arguments, tmp_path / "alone.jsonl"]
    # The same number of threads as a task of the array, which determines rounding.
    subprocess.run(
        [str(word) for word in alone],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": slurm.environment["OMP_NUM_THREADS"]},
    )
    written = (tmp_path / "array.jsonl").read_bytes()
    assert written.count(b"\n") > 10
    assert written == (tmp_path / "alone.jsonl").read_bytes()
