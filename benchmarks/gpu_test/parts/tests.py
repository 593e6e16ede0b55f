"""The tests of tests/gpu, without those that train (the other parts do) unless there is time."""

import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import ATTENTION
from benchmarks.gpu_test.runs import ROOT, environment


def run(bench: Bench) -> None:
    run_tests(bench, "not slow", 200)


def run_tests(bench: Bench, marks: str, limit_s: float) -> None:
    """Run the tests of some marks; each is a check."""
    junit = bench.work / f"tests-{marks.replace(' ', '-')}.xml"
    junit.unlink(missing_ok=True)
    words = ["-m", "pytest", "tests/gpu", "-m", marks, "-q", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [sys.executable, *words, f"--junitxml={junit}"],
        cwd=ROOT,
        env=environment(),
    )
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then writes the results that it has
        process.wait(20)
    finally:
        if process.poll() is None:
            process.kill()
    if not junit.exists():
        raise RuntimeError(f"pytest ended with {process.returncode} and without results")
    # Written by pytest itself, a moment ago.
    for case in ElementTree.parse(junit).iter("testcase"):  # noqa: S314
        name = case.get("name", "?")
        failure = next(
            (case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None
        )
        skipped = case.find("skipped")
        if failure is not None:
            bench.require(name, False, str(failure.get("message", ""))[:300], ATTENTION)
        elif skipped is not None:
            reason = str(skipped.get("message", ""))
            bench.skip(name, reason if bench.is_gpu else WANTS_A_GPU, ATTENTION)
        else:
            bench.require(name, True, "", ATTENTION, seconds=float(case.get("time", 0)))
    if process.returncode not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {process.returncode}")
