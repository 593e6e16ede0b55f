"""Cost of saving and resuming: stall of a save relative to DeepSpeed's; time to stop and to resume.

    python benchmarks/checkpoint.py SHARDS [--width 768] [--layers 8] [--turns 5]

One process. Our save stalls training while slices are copied to host memory, and briefly when the
checkpoint is completed; DeepSpeed's engine.save_checkpoint stalls it until everything is written.
Medians of wall-clock seconds, in turns; both flush to the same disk. Then `megaback train` with two
ranks on a tiny run: time from SIGTERM to exit, and from the command to the first step after a
resume.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import click
import yaml
from smoke import Benchmark

from data_pipeline.text.codec import Direction, Unit
from launcher.ranks.local import rank_environment

VOCAB_SIZE = 8_888


def time_saves(width: int, layers: int, turns: int, folder: Path) -> None:
    """Print the stalls of both ways of saving."""
    os.environ |= rank_environment(1)
    import torch

    from megaback.checkpoints.checkpoint import CheckpointMeta
    from megaback.checkpoints.saver import CheckpointSaver
    from megaback.checkpoints.state import named_state
    from megaback.config import Config
    from megaback.config_operation import CheckpointSection
    from megaback.distributed.engine import start_engine
    from megaback.distributed.world import end_rank, start_world
    from megaback.model.gpt import ReverseGPT

    config = Config.model_validate(
        {
            "run": folder / "run",
            "data": {"shards": "unused"},
            "model": {"num_layers": layers, "width": width, "num_heads": 8},
            "batch": {"context_tokens": 64, "global_batch_rows": 1, "micro_batch_rows": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "precision": "fp32"},
            "zero": {"stage": 2},
        }
    )
    world = start_world("cpu", 600)
    model = ReverseGPT(config.model, VOCAB_SIZE)
    model.initialize(0)
    engine = start_engine(model, config, 1, 1)
    for flat in (
        engine.optimizer.single_partition_of_fp32_groups
    ):  # optimizer state exists, as after a first step
        zeros = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
        engine.basic_optimizer.state[flat] = {"step": torch.tensor(1.0), **zeros}
    saver = CheckpointSaver(config.run, b"", CheckpointSection(), world)
    meta = CheckpointMeta(
        step=0,
        updates=1,
        world_size=1,
        zero_stage=2,
        precision="fp32",
        vocab_size=VOCAB_SIZE,
        text_format={
            "direction": Direction.BACKWARD.value,
            "unit": Unit.TOKEN.value,
            "tokenizer_sha256": "0" * 64,
        },
        data_fingerprint="",
        config={},
        val_loss=None,
        versions={},
        files={},
    )
    stalls: dict[str, list[float]] = {name: [] for name in ("begin", "finish", "written", "plain")}
    for turn in range(turns + 1):
        started = time.perf_counter()
        saver.begin(named_state(engine, 0, 1), replace_step(meta, turn))
        stalls["begin"].append(time.perf_counter() - started)
        while saver.is_writing:
            time.sleep(0.001)
        stalls["written"].append(time.perf_counter() - started)
        started = time.perf_counter()
        saver.finish()
        stalls["finish"].append(time.perf_counter() - started)
        started = time.perf_counter()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            engine.save_checkpoint(str(folder / "plain"), tag=f"step-{turn}")
        os.sync()
        stalls["plain"].append(time.perf_counter() - started)
        shutil.rmtree(folder / "plain")
    medians = {name: statistics.median(times[1:]) for name, times in stalls.items()}
    gigabytes = sum(path.stat().st_size for path in newest(config.run).iterdir()) / 1e9
    stall = medians["begin"] + medians["finish"]
    print(
        f"a checkpoint of {gigabytes:.2f} GB: ours stalls for {stall:.3f} s (copying "
        f"{medians['begin']:.3f} s, completing {medians['finish']:.3f} s; first save "
        f"{stalls['begin'][0]:.3f} s) and is written after {medians['written']:.2f} s; "
        f"engine.save_checkpoint stalls for {medians['plain']:.2f} s: "
        f"{medians['plain'] / stall:.1f} times as long"
    )
    end_rank()


def replace_step(meta: Any, step: int) -> Any:
    """The same checkpoint at another step."""
    from dataclasses import replace

    return replace(meta, step=step)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))


def time_commands(shards: str, turns: int, folder: Path) -> None:
    """Print how long stopping and resuming take."""
    config = folder / "config.yaml"
    fields = {
        "run": str(folder / "tiny"),
        "data": {"shards": shards},
        "model": {"num_layers": 2, "width": 128, "num_heads": 4},
        "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 100_000, "precision": "fp32"},
        "hardware": {"device": "cpu", "processes": 2},
    }
    config.write_text(yaml.safe_dump(fields))
    metrics = folder / "tiny" / "metrics.jsonl"
    stopping, continuing = [], []
    for _ in range(turns + 1):
        before = last_step(metrics)
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "megaback", "train", config],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while last_step(metrics) <= before:
            time.sleep(0.02)
        continuing.append(time.perf_counter() - started)
        time.sleep(1)
        started = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
        stopping.append(time.perf_counter() - started)
    print(
        f"2 ranks: from SIGTERM to exit {statistics.median(stopping[1:]):.2f} s; from the "
        f"command to the first resumed step {statistics.median(continuing[1:]):.2f} s"
    )


def last_step(metrics: Path) -> int:
    """The last training step in a file of metrics."""
    if not metrics.exists():
        return -1
    lines = metrics.read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    return max(steps, default=-1) if lines else -1


@click.command(cls=Benchmark, smoke="{shards} --width 32 --layers 1 --turns 1")
@click.argument("shards")
@click.option("--width", default=768, show_default=True, help="Model width.")
@click.option("--layers", default=8, show_default=True, help="Number of layers.")
@click.option(
    "--turns", default=5, show_default=True, help="Turns per contender; medians are printed."
)
def main(shards: str, width: int, layers: int, turns: int) -> None:
    """Time saving, stopping and resuming."""
    with tempfile.TemporaryDirectory() as name:
        time_saves(width, layers, turns, Path(name))
    with tempfile.TemporaryDirectory() as name:
        time_commands(shards, turns, Path(name))


if __name__ == "__main__":
    main()
