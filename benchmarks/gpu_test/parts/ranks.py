"""Several ranks: ZeRO over NCCL (gloo on a CPU) against one rank, and a killed rank."""

import os
import signal
import subprocess
import time
from pathlib import Path

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import LOST_RANK, NCCL, OVERLAP, PREFLIGHT
from benchmarks.gpu_test.runs import (
    ROOT,
    command,
    environment,
    last_lines,
    num_steps_of,
    run_command,
    run_config,
)
from data_pipeline.errors import RankLostError
from megaback.faults.heartbeat import read_heartbeat
from megaback.run_folder import heartbeat_path
from megaback.tracking.metrics import read_metrics

_MAX_NATS = 0.01
_WAIT_S = 120


def run(bench: Bench) -> None:
    if bench.num_devices == 1:
        for claim in (NCCL, OVERLAP, PREFLIGHT, LOST_RANK):
            bench.skip("several ranks", "wants 2 GPUs", claim)
        return
    ranks = min(bench.num_devices or 2, 4)
    folder = bench.work / "ranks"
    folder.mkdir(exist_ok=True)
    alone = _losses(bench, folder / "alone", 1, 1)
    settings = [(stage, None, "all_reduce") for stage in bench.sized((0, 1, 2, 3), (2,), (2,))]
    if bench.is_gpu:
        settings += [(2, True, "all_reduce"), (2, False, "reduce")]  # type: ignore[list-item]
    for stage, overlap, reduction in settings:
        name = f"{ranks} ranks, ZeRO {stage}" + (", overlapped" if overlap else f", {reduction}")
        claim = OVERLAP if overlap or stage == 3 else NCCL
        with bench.attempt(name, claim):
            run_path = folder / f"zero-{stage}-{overlap}-{reduction}"
            losses = _losses(bench, run_path, ranks, stage, overlap, reduction)
            difference = max(abs(one - other) for one, other in zip(losses, alone, strict=True))
            bench.require(
                name,
                difference <= _MAX_NATS,
                f"losses of one rank, at most {_MAX_NATS} nats off",
                claim,
                max_difference_nats=difference,
            )
    bench.require("preflight", True, "passed at the start of each of these runs", PREFLIGHT)
    with bench.attempt("a killed rank", LOST_RANK):
        _check_killed(bench, folder / "killed", ranks)


def _losses(
    bench: Bench,
    run_path: Path,
    ranks: int,
    stage: int,
    overlap: bool | None = None,
    reduction: str = "all_reduce",
) -> list[float]:
    config = run_config(
        bench,
        run_path,
        hardware={"processes": ranks},
        zero={"stage": stage, "overlap_communication": overlap, "reduction": reduction},
        batch={"micro_batch_rows": 2},
        training={"steps": 6, "compile": "off"},
    )
    done = run_command("train", config)
    if done.returncode:
        raise RuntimeError(f"a run ended with {done.returncode}: {last_lines(done.stderr)}")
    return [line["loss"] for line in read_metrics(run_path) if "loss" in line]


def _check_killed(bench: Bench, run_path: Path, ranks: int) -> None:
    """Kill the last rank in the midst of training: the others name it, and the run ends with 51."""
    config = run_config(
        bench,
        run_path,
        hardware={"processes": ranks, "preflight": "off"},
        zero={"stage": 2},
        batch={"micro_batch_rows": 2},
        training={"steps": 100_000, "compile": "off"},
    )
    log = run_path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command("train", config), cwd=ROOT, env=environment(), stdout=output, stderr=output
        )
        try:
            give_up = time.monotonic() + _WAIT_S
            while num_steps_of(run_path) < 3 and process.poll() is None:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"no step 3 after {_WAIT_S} s")
                time.sleep(0.05)
            beat = read_heartbeat(heartbeat_path(run_path, ranks - 1))
            if beat is None:
                raise RuntimeError(f"rank {ranks - 1} has no heartbeat: {_end_of(log)}")
            os.kill(beat.pid, signal.SIGKILL)
            killed = time.monotonic()
            code = process.wait(_WAIT_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(30)
    text = log.read_text(encoding="utf-8", errors="replace")
    bench.require(
        "a killed rank",
        code == RankLostError.exit_code and f"rank {ranks - 1}" in text,
        f"exit {code}: {last_lines(text, 2)}",
        LOST_RANK,
        seconds_to_exit=time.monotonic() - killed,
    )


def _end_of(log: Path) -> str:
    return last_lines(log.read_text(encoding="utf-8", errors="replace"))
