"""A real lack of memory ends a run with its own exit code and message; expandable segments."""

import torch

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import OUT_OF_MEMORY
from benchmarks.gpu_test.runs import last_lines, run_command, run_config
from data_pipeline.errors import DeviceMemoryError

_MESSAGE = "is out of memory"


def run(bench: Bench) -> None:
    _check_segments(bench)
    # Hidden states of a forward pass alone, in bf16 and of 32 layers, exceed twice the memory.
    width, layers, context = bench.sized((1024, 32, 2048), (32, 1, 64), (32, 1, 64))
    rows = 2
    if bench.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(bench.device).total_memory
        row_bytes = 2 * width * layers * context
        rows = 1 << (2 * memory_bytes // row_bytes).bit_length()
    config = run_config(
        bench,
        bench.work / "out_of_memory",
        model={"num_layers": layers, "width": width, "num_heads": max(width // 64, 1)},
        batch={"context_tokens": context, "global_batch_rows": rows, "micro_batch_rows": rows},
        training={"steps": 2, "compile": "off"},
        hardware={"memory_check": "off"},
    )
    with bench.attempt("a run that does not fit", OUT_OF_MEMORY):
        done = run_command("train", config)
        if not bench.is_gpu:
            problem = f": {last_lines(done.stderr)}" if done.returncode else ""
            bench.require("the same run, where it fits", not done.returncode, f"exit 0{problem}")
            bench.skip("a run that does not fit", WANTS_A_GPU, OUT_OF_MEMORY)
            return
        bench.require(
            "a run that does not fit",
            done.returncode == DeviceMemoryError.exit_code and _MESSAGE in done.stderr,
            f"exit {done.returncode}: {last_lines(done.stderr, 2)}",
            OUT_OF_MEMORY,
            micro_batch_rows=rows,
        )


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
