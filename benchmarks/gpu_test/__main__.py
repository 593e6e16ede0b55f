"""`python -m benchmarks.gpu_test`: what only a GPU can show, checked and measured."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_test.registry import BY_NAME, PARTS, Part
from benchmarks.gpu_test.report import differing_facts, read_report, write_report
from benchmarks.gpu_test.results import PartResult
from benchmarks.gpu_test.runner import NOT_DONE, STILL_RUNNING, Runner, log_path, part_command
from data_pipeline.common.command import Command
from data_pipeline.common.locks import locked
from data_pipeline.errors import ConfigError, OutputExistsError
from megaback.environment import use_expandable_segments

_ROOT = Path(__file__).parents[2]
_INCOMPLETE = 3
_CORES_PER_JOB = 4
_MAX_JOBS = 4
_MAX_LOG_CHARACTERS = 100_000
_MARK = ".gpu-test"
"""File by which the folder is known to be ours."""


@click.command(cls=Command, name="gpu-test")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("build/gpu-test"),
    show_default=True,
    help="Folder of the report and of the log.",
)
@click.option("--parts", help=f"Parts to run: {', '.join(BY_NAME)}. Default: all.")
@click.option("--again", is_flag=True, help="Repeat the parts that the report already has.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.5),
    default=8.0,
    show_default=True,
    help="Time for this start; the next one continues.",
)
@click.option(
    "--size",
    type=click.Choice(["full", "cpu", "smoke"]),
    help="Sizes of models and data. Default: full with a GPU, cpu without.",
)
@click.option(
    "--smoke", is_flag=True, help="Only check that the parts run, in seconds, with tiny sizes."
)
def main(
    out: Path, parts: str | None, again: bool, minutes: float, size: str | None, smoke: bool
) -> None:
    """Check and measure on this machine's GPUs what tests without one cannot.

    Each part is a process with a time limit. The report (report.json, report.md) is replaced after
    each, names the lines of docs/unverified.md that a part is about, and keeps the parts of earlier
    starts. The exit status is 0 if all that can run here passed, 1 if something failed, and 3 if
    time ended before all parts: the same command continues.
    """
    chosen = _chosen(parts)
    _set_environment()
    if smoke:
        sys.exit(_smoke_run())
    out = out.absolute()
    _claim_folder(out)
    with locked(out / _MARK, wait=False) as is_free:
        if not is_free:
            raise OutputExistsError(f"another gpu-test is running in {out}; use another --out")
        sys.exit(_run(out, chosen, again, minutes, size))


def _run(out: Path, chosen: Sequence[Part], again: bool, minutes: float, size: str | None) -> int:
    facts = _facts()
    facts["size"] = size or ("full" if facts["device"] == "cuda" else "cpu")
    facts["started"] = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    earlier, results = read_report(out)
    differing = differing_facts(earlier, facts) if results else []
    if differing and not again:
        raise OutputExistsError(
            f"{out} has the report of another machine or version ({', '.join(differing)} differ); "
            "use another --out, or --again to replace it"
        )
    if differing:
        results = {}
    waiting = [
        part for part in chosen if again or part.name not in results or _is_late(results[part.name])
    ]
    if facts["device"] == "cpu":
        print("torch sees no GPU: every part runs as far as a CPU can, with small sizes")

    def record(result: PartResult) -> None:
        results[result.name] = result
        write_report(out, facts, results)
        if result.detail == STILL_RUNNING:
            return
        _keep_log(out, log_path(work, BY_NAME[result.name]))
        print(f"{result.name}: {result.status}, {result.seconds:.0f} s", flush=True)
        for check in result.checks:
            if check.status == "failed":
                print(f"  failed: {check.name}: {check.detail}", flush=True)
        if result.detail:
            print(f"  {result.detail}", flush=True)

    cores_per_job = _CORES_PER_JOB if facts["device"] == "cuda" else 1
    jobs = min(max(facts["cores"] // cores_per_job, 1), _MAX_JOBS)
    with tempfile.TemporaryDirectory(prefix="gpu-test-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        runner = Runner(
            work, facts["size"], facts["device"], record, jobs=jobs, limit_s=minutes * 60
        )
        try:
            runner.run(waiting)
        except KeyboardInterrupt:
            print(f"interrupted; the report of what is done is {out / 'report.md'}", flush=True)
            raise
    print(f"report: {out / 'report.md'}")
    shown = [results[part.name] for part in chosen if part.name in results]
    if any(result.status == "failed" for result in shown):
        return 1
    return _INCOMPLETE if any(map(_is_late, shown)) else 0


def _is_late(result: PartResult) -> bool:
    """Whether a part was not run to its end for lack of time."""
    return result.detail.startswith(NOT_DONE)


def _keep_log(out: Path, log: Path) -> None:
    """Add the end of what a part printed to the folder's log."""
    if not log.exists():
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    with (out / "logs.txt").open("a", encoding="utf-8") as file:
        file.write(f"==== {log.stem}\n{text[-_MAX_LOG_CHARACTERS:]}\n")


def _chosen(parts: str | None) -> list[Part]:
    if parts is None:
        return list(PARTS)
    names = [name.strip() for name in parts.split(",") if name.strip()]
    unknown = [name for name in names if name not in BY_NAME]
    if unknown or not names:
        raise ConfigError(f"--parts is {parts!r}; the parts are {', '.join(BY_NAME)}")
    return [part for part in PARTS if part.name in names]


def _claim_folder(out: Path) -> None:
    """Create the folder. Raises OutputExistsError for one with other contents."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise OutputExistsError(f"{out} has other contents; use another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _set_environment() -> None:
    """Variables of all parts: the checkout's code, the allocator of ranks, no network."""
    use_expandable_segments()
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    if len(os.sched_getaffinity(0)) < 2 * _CORES_PER_JOB:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def _facts() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_test.facts"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _smoke_run() -> int:
    """Run the parts that need no process of a rank in one process; returns its exit code."""
    names = [part.name for part in PARTS if part.is_in_smoke_runs]
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as folder:
        command = part_command(names, Path(folder), "smoke")
        return subprocess.run(command, check=False, timeout=300).returncode


if __name__ == "__main__":
    main()
