"""Real runs of `megaback train` on small shards, which the parts share."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_test.bench import Bench
from benchmarks.smoke import MadeUp
from data_pipeline.common.locks import locked
from megaback.run_folder import METRICS_NAME

ROOT = Path(__file__).parents[2]
"""The checkout, whose code is tested."""
CONTEXT_TOKENS = 64
VOCAB_SIZE = 600


def shards_of(bench: Bench) -> Path:
    """Small backward shards with a val set, made once for all parts."""
    folder = bench.work / "data"
    folder.mkdir(exist_ok=True)
    with locked(folder / ".lock"):
        shards = folder / "shards"
        if not (folder / "made").exists():
            MadeUp(folder)["shards"]
            (folder / "made").touch()
        return shards


def run_config(bench: Bench, run: Path, **sections: dict[str, Any]) -> Path:
    """A config of one rank of 64 tokens per row; `sections` replace single values."""
    fields: dict[str, dict[str, Any]] = {
        "data": {"shards": str(shards_of(bench))},
        "model": bench.sized(
            {"num_layers": 4, "width": 256, "num_heads": 4, "num_kv_heads": 2},
            {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2},
            {"num_layers": 1, "width": 32, "num_heads": 2},
        ),
        "batch": {
            "context_tokens": CONTEXT_TOKENS,
            "global_batch_rows": 16,
            "micro_batch_rows": 8,
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "precision": "bf16", "seed": 4},
        "zero": {"stage": 1},
        "hardware": {"device": bench.device.type, "processes": 1, "heartbeat_s": 1},
        "logging": {"tensorboard": "off"},
    }
    for name, section in sections.items():
        fields[name] = fields.get(name, {}) | section
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({"run": str(run), **fields}), encoding="utf-8")
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "megaback", *map(str, words)]


def environment() -> dict[str, str]:
    """Variables of a process of ours: the checkout's code, from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_command(*words: object, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
    """Run a megaback command to its end. Raises TimeoutExpired."""
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout_s,
    )


def num_steps_of(run: Path) -> int:
    """Number of training steps in a run's metrics."""
    try:
        return (run / METRICS_NAME).read_text(encoding="utf-8").count('"learning_rate"')
    except FileNotFoundError:
        return 0


def last_lines(text: str, number: int = 4) -> str:
    """The end of an output, as one line."""
    return " / ".join(text.strip().splitlines()[-number:])[-600:]
