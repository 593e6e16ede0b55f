"""A real lack of memory ends a run with its own exit code and message; expandable segments."""

from pathlib import Path

import torch

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import OUT_OF_MEMORY
from benchmarks.gpu_test.runs import VOCAB_SIZE, last_lines, run_command, run_config
from data_pipeline.errors import DeviceMemoryError
from megaback.config_file import load_config
from megaback.planning.memory_room import planned_memory

_MESSAGE = "is out of memory"
_EXCESS = 2
"""Planned memory of the run, as a multiple of the device's."""


def run(bench: Bench) -> None:
    _check_segments(bench)
    rows, config = 2, _config(bench, 2)
    if bench.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(bench.device).total_memory
        while _planned_bytes(config) < _EXCESS * memory_bytes:
            rows *= 2
            config = _config(bench, rows)
    with bench.attempt("a run that does not fit", OUT_OF_MEMORY):
        done = run_command("train", config)
        if not bench.is_gpu:
            problem = f": {last_lines(done.stderr)}" if done.returncode else ""
            bench.require(
                "the same run, where it fits",
                not done.returncode,
                f"exit {done.returncode}{problem}",
            )
            bench.skip("a run that does not fit", WANTS_A_GPU, OUT_OF_MEMORY)
            return
        bench.require(
            "a run that does not fit",
            done.returncode == DeviceMemoryError.exit_code and _MESSAGE in done.stderr,
            f"exit {done.returncode}: {last_lines(done.stderr, 2)}",
            OUT_OF_MEMORY,
            micro_batch_rows=rows,
        )


def _config(bench: Bench, rows: int) -> Path:
    width, layers, context_tokens = bench.sized((1024, 16, 1024), (32, 1, 64), (32, 1, 64))
    return run_config(
        bench,
        bench.work / "out_of_memory",
        model={
            "num_layers": layers,
            "width": width,
            "num_heads": max(width // 64, 1),
            "num_kv_heads": None,
        },
        batch={
            "context_tokens": context_tokens,
            "global_batch_rows": rows,
            "micro_batch_rows": rows,
        },
        training={"steps": 2, "compile": "off"},
        hardware={"memory_check": "off"},
    )


def _planned_bytes(path: Path) -> float:
    config = load_config(path, ())
    return planned_memory(config, VOCAB_SIZE, 1, "cuda").parts.total


def _check_segments(bench: Bench) -> None:
    """Whether the allocator has the setting that ranks, and these parts, have."""
    name = "expandable segments"
    if bench.device.type != "cuda":
        bench.skip(name, WANTS_A_GPU, OUT_OF_MEMORY)
        return
    with bench.attempt(name, OUT_OF_MEMORY):
        held = torch.empty(1 << 24, device=bench.device)
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        is_set = any(segment.get("is_expandable") for segment in segments)
        bench.require(
            name, is_set, "the allocator's snapshot has them", OUT_OF_MEMORY, bytes=held.nbytes
        )
