"""A run that is interrupted and resumed, compared bit for bit with an uninterrupted one."""

import filecmp
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import COMPILE, DETERMINISTIC, SAVING
from benchmarks.gpu_test.runs import (
    ROOT,
    command,
    environment,
    last_lines,
    num_steps_of,
    run_command,
    run_config,
)
from data_pipeline.errors import PreemptedError
from megaback.run_folder import CHECKPOINTS_FOLDER, META_NAME, newest_checkpoint_step, step_name
from megaback.tracking.metrics import MACHINE_FIELDS, read_metrics

_START_S = 180


def run(bench: Bench) -> None:
    bench.work.mkdir(exist_ok=True)
    for name, stage, compiled, optimizer in bench.sized(
        (("compiled", 1, "on", "muon"), ("not compiled, ZeRO 3", 3, "off", "adamw")),
        (("not compiled", 1, "off", "muon"),),
        (("not compiled", 1, "off", "muon"),),
    ):
        with bench.attempt(name, DETERMINISTIC):
            _check(bench, name, stage, compiled, optimizer)


def _check(bench: Bench, name: str, stage: int, compiled: str, optimizer: str) -> None:
    steps = bench.sized(300, 60, 24)
    sections: dict[str, dict[str, Any]] = {
        "training": {"steps": steps, "compile": compiled, "deterministic": True},
        "optimizer": {"name": optimizer},
        "zero": {"stage": stage},
        "checkpoint": {"every_steps": steps // 3},
    }
    folder = bench.work / f"resume-{stage}-{compiled}"
    folder.mkdir(exist_ok=True)
    whole, cut = folder / "whole", folder / "cut"
    done = run_command("train", run_config(bench, whole, **sections))
    if done.returncode:
        raise RuntimeError(f"a run ended with {done.returncode}: {last_lines(done.stderr)}")
    config = run_config(bench, cut, **sections)
    code, output = _interrupted(config, cut, steps // 2)
    if code != PreemptedError.exit_code:
        raise RuntimeError(f"the interrupted run ended with {code}: {last_lines(output)}")
    stopped_at = newest_checkpoint_step(cut)
    done = run_command("train", config)
    if done.returncode:
        raise RuntimeError(
            f"the resumed run ended with {done.returncode}: {last_lines(done.stderr)}"
        )
    differing = list(differences(whole, cut, steps))
    bench.require(
        f"{name}: resumed",
        not differing,
        "; ".join(differing) or "metrics and the last checkpoint of an uninterrupted run",
        DETERMINISTIC,
        steps=steps,
        resumed_from_step=stopped_at,
    )
    bench.require(
        f"{name}: interrupted",
        0 < stopped_at < steps,
        "saved at a step between the first and the last, with exit code 75",
        SAVING,
    )
    if compiled == "on":
        text = "compiled the model again"
        bench.require(f"{name}: graphs", text not in output + done.stderr, f"never {text}", COMPILE)


def _interrupted(config: Path, run: Path, step: int) -> tuple[int, str]:
    """Exit code and messages of a run that gets SIGTERM at a step."""
    log = run.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command("train", config), cwd=ROOT, env=environment(), stdout=output, stderr=output
        )
        try:
            give_up = time.monotonic() + _START_S
            while num_steps_of(run) < step and process.poll() is None:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"no step {step} after {_START_S} s")
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            return process.wait(_START_S), log.read_text(encoding="utf-8", errors="replace")
        finally:
            if process.poll() is None:
                process.kill()


def differences(whole: Path, cut: Path, steps: int) -> Iterator[str]:
    """Differences between two runs that have the same config, besides the speed."""
    lines = [
        [
            {name: value for name, value in line.items() if name not in MACHINE_FIELDS}
            for line in read_metrics(run)
        ]
        for run in (whole, cut)
    ]
    if lines[0] != lines[1]:
        first = next(
            (one for one, other in zip(*lines, strict=False) if one != other), {"step": "the end"}
        )
        yield f"metrics differ from step {first.get('step')}"
    folders = [run / CHECKPOINTS_FOLDER / step_name(steps) for run in (whole, cut)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    if names[0] != names[1]:
        yield f"checkpoints have the files {names[0]} and {names[1]}"
        return
    for name in names[0]:
        if name == META_NAME:  # which has the name of the run
            continue
        if not filecmp.cmp(folders[0] / name, folders[1] / name, shallow=False):
            yield f"{name} of the last checkpoint differs"
