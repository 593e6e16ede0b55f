"""Process of some parts: `python -m benchmarks.gpu_test.part PARTS --work DIR --size SIZE`."""

import importlib
import sys
import warnings
from pathlib import Path

import click
import torch

from benchmarks.gpu_test.bench import Bench, Size
from data_pipeline.common.interrupts import leave
from megaback.distributed.world import choose_device


def results_path(work: Path, part: str) -> Path:
    return work / f"{part}.jsonl"


def run_parts(parts: tuple[str, ...], work: Path, size: Size) -> int:
    """Run parts one after another; returns the number of failed checks."""
    device = choose_device("auto", 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    failures = 0
    for part in parts:
        results = results_path(work, part)
        bench = Bench(device, size, work, results, torch.cuda.device_count())
        module = importlib.import_module(f"benchmarks.gpu_test.parts.{part}")
        with bench.attempt(f"{part} as a whole"):
            module.run(bench)
        failures += bench.failures
    return failures


@click.command()
@click.argument("parts")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--size", type=click.Choice(["full", "cpu", "smoke"]), required=True)
def main(parts: str, work: Path, size: Size) -> None:
    """Run parts, whose names are separated by commas."""
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of names that DeepSpeed uses
    failures = run_parts(tuple(parts.split(",")), work, size)
    sys.stdout.flush()
    leave(int(failures > 0))  # as a rank ends, without the interpreter's teardown


if __name__ == "__main__":
    main()
