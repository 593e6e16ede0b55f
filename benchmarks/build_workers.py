"""Scaling of a build's workers: time with one and with two, and their peak memory.

    python benchmarks/build_workers.py TOKENIZER FILE...

Runs `megaback shards build` as a user does, on the files and on several copies of them: a worker's
memory must not grow with the input. The page cache is warm before the first timed run.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil
from smoke import Benchmark

from data_pipeline.shards.manifest import Manifest

_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
_POLL_S = 0.02


@dataclass(frozen=True)
class Run:
    """One build."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    text_bytes: int


def build(tokenizer: Path, source: Path, out: Path, workers: int) -> Run:
    """Build shards and watch the workers."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["--source", source, "--tokenizer", tokenizer, "--out", out, "--workers", workers]
    command = [sys.executable, "-m", "megaback", "shards", "build", *map(str, words)]
    before = os.times()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_kb = 0
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                continue
            if match := _PEAK.search(status):
                peak_kb = max(peak_kb, int(match[1]))
        time.sleep(_POLL_S)
    wall_s = time.monotonic() - started
    after = os.times()
    if process.returncode:
        raise SystemExit("the build failed")
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    manifest = Manifest.load(out)
    text_bytes = sum(manifest.total(split)["text_bytes"] for split in ("train", "val"))
    return Run(wall_s, cpu_s, peak_kb / 1e3, text_bytes)


@click.command(cls=Benchmark, smoke="{tokenizer} {file} --copies 2 --repeats 1")
@click.argument("tokenizer", type=click.Path(path_type=Path, exists=True))
@click.argument("files", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option(
    "--copies", default=8, show_default=True, help="Copies of the input in the second size."
)
@click.option(
    "--repeats", default=3, show_default=True, help="Runs per contender; medians are printed."
)
def main(tokenizer: Path, files: tuple[Path, ...], copies: int, repeats: int) -> None:
    """Print wall time, CPU time and peak memory with 1 and 2 workers, medians."""
    with tempfile.TemporaryDirectory() as folder:
        click.echo("input MB  workers  wall s  CPU s  MB/s   peak MB per worker")
        for number in (1, copies):
            source = Path(folder) / f"source-{number}"
            source.mkdir()
            for copy in range(number):
                for file in files:
                    shutil.copy(file, source / f"{copy}-{file.name}")
            medians: dict[int, float] = {}
            rounds = [
                {n: build(tokenizer, source, Path(folder) / "out", n) for n in (1, 2)}
                for _ in range(repeats)
            ]
            for workers in (1, 2):
                runs = [of_round[workers] for of_round in rounds]
                wall_s = statistics.median(run.wall_s for run in runs)
                cpu_s = statistics.median(run.cpu_s for run in runs)
                medians[workers] = wall_s
                click.echo(
                    f"{runs[0].text_bytes / 1e6:8.1f}  {workers:7}  {wall_s:6.2f}  {cpu_s:5.2f}  "
                    f"{runs[0].text_bytes / wall_s / 1e6:5.1f}  {max(r.peak_mb for r in runs):8.0f}"
                )
            click.echo(f"two workers are {medians[1] / medians[2]:.2f} times as fast as one")


if __name__ == "__main__":
    main()
