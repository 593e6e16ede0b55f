"""Kill a run at random times, repeatedly, and compare its metrics with an uninterrupted run's.

    python benchmarks/soak.py SHARDS [--cycles 100] [--seed 0]

Each cycle starts `megaback train` (2 ranks) and, after a random time, sends SIGTERM or SIGKILL to
the launcher, one rank or all of them, in any phase: starting, training, validating, saving.
Occasionally the newest checkpoint is damaged. ZeRO stages alternate between experiments, not within
one, so that the metrics must be equal bit for bit.
"""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from smoke import Benchmark

from megaback.tracking.metrics import MACHINE_FIELDS

_DAMAGE_SHARE = 0.1


def config_of(
    shards: str, steps: int, stage: int, processes: int, every_steps: int
) -> dict[str, Any]:
    """A tiny run that saves and validates often."""
    return {
        "run": "run",
        "data": {"shards": shards},
        "model": {"num_layers": 2, "width": 32, "num_heads": 4},
        "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 10, "name": "muon"},
        "training": {"steps": steps, "precision": "fp32"},
        "zero": {"stage": stage},
        "hardware": {
            "device": "cpu",
            "processes": processes,
            "heartbeat_s": 1,
            "step_timeout_s": 20,
            "collective_timeout_s": 60,
        },
        "validation": {"every_steps": every_steps},
        "checkpoint": {"every_steps": 10},
        "logging": {"every_steps": 100},
    }


def start(config: Path, run: Path) -> "subprocess.Popen[bytes]":
    """`megaback train`, its output added to RUN.txt."""
    with run.with_suffix(".txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "megaback", "train", config, f"run={run}"],
            stdout=output,
            stderr=output,
        )


def disturb(launcher: "subprocess.Popen[bytes]", dice: random.Random) -> str:
    """Send a random signal to random processes of a run; returns a description."""
    ranks = psutil.Process(launcher.pid).children()
    number = dice.choice([signal.SIGTERM, signal.SIGKILL])
    target = dice.choice(["launcher", "one rank", "all ranks"])
    if not ranks or target == "launcher":
        launcher.send_signal(number)
        target = "launcher"
    else:
        for process in ranks if target == "all ranks" else [dice.choice(ranks)]:
            process.send_signal(number)
    psutil.wait_procs(ranks, timeout=120)
    return f"{number.name} to {target}"


def damage_newest(run: Path, dice: random.Random) -> bool:
    """Truncate a file of the newest checkpoint, if there is an older one; whether it was done."""
    complete = sorted(path.parent for path in (run / "checkpoints").glob("step-*/meta.json"))
    if len(complete) < 2 or dice.random() > _DAMAGE_SHARE:
        return False
    path = dice.choice(sorted(complete[-1].glob("*.safetensors")))
    path.write_bytes(path.read_bytes()[:-100])
    return True


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without timings; none of a run that was stopped before its start."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {key: value for key, value in line.items() if key not in MACHINE_FIELDS} for line in lines
    ]


@click.command(cls=Benchmark, smoke="{shards} --cycles 1 --max-s 2 --processes 1 --every-steps 10")
@click.argument("shards")
@click.option("--cycles", default=100, show_default=True, help="Number of interruptions.")
@click.option(
    "--steps", default=20_000, show_default=True, help="Steps of the run; more than it reaches."
)
@click.option("--processes", default=2, show_default=True, help="Number of processes.")
@click.option("--stage", default=2, show_default=True, help="ZeRO stage.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random number generator.")
@click.option(
    "--max-s", default=11.0, show_default=True, help="Maximum seconds until a cycle is disturbed."
)
@click.option(
    "--every-steps",
    default=100,
    show_default=True,
    help="Steps between measurements of the val set; the last start ends at one of them.",
)
def main(
    shards: str,
    cycles: int,
    steps: int,
    processes: int,
    stage: int,
    seed: int,
    max_s: float,
    every_steps: int,
) -> None:
    """Disturb a run, then compare it with an undisturbed one."""
    dice = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(shards, steps, stage, processes, every_steps)))
    run, done = folder / "disturbed", Counter[str]()
    codes: Counter[int] = Counter()
    started = time.monotonic()
    for cycle in range(cycles):
        launcher = start(config, run)
        time.sleep(dice.uniform(1, max_s))
        done[disturb(launcher, dice) if launcher.poll() is None else "it had ended"] += 1
        codes[launcher.wait()] += 1
        if damage_newest(run, dice):
            done["newest checkpoint damaged"] += 1
        if cycle % 10 == 9:
            print(f"{cycle + 1} cycles, {time.monotonic() - started:.0f} s", flush=True)
    # A last, undisturbed start, to a step that is saved and validated; the other run trains to it.
    reached = max((line["step"] for line in metrics_of(run)), default=0)
    last = (reached // every_steps + 1) * every_steps
    for target in (run, folder / "peaceful"):
        process = start_to(config, target, last)
        if process:
            raise click.ClickException(f"the run in {target} ended with code {process}")
    disturbed, peaceful = metrics_of(run)[:], metrics_of(folder / "peaceful")
    print(f"{cycles} cycles to step {last}: {dict(done)}; exit codes {dict(codes)}")
    if disturbed != peaceful:
        raise click.ClickException(f"the metrics differ: compare the runs in {folder}")
    print(f"all {len(disturbed)} lines of the metrics are equal, except timings")


def start_to(config: Path, run: Path, last: int) -> int:
    """Train up to a step, save and stop; 0 if it stopped as requested."""
    launcher = start(config, run)
    path = run / "metrics.jsonl"
    while launcher.poll() is None:
        time.sleep(0.2)
        if path.exists() and path.read_text().count('"learning_rate"') >= last:
            launcher.send_signal(signal.SIGTERM)
            break
    code = launcher.wait()
    if code != 75:
        return code
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= last]
    path.write_text("".join(kept))
    return 0


if __name__ == "__main__":
    main()
