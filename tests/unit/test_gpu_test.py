"""The GPU test: limits of its parts, its report, and the parts on the fake GPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from click.testing import CliRunner

from benchmarks.gpu_test import __main__ as gpu_test
from benchmarks.gpu_test import runner as runner_module
from benchmarks.gpu_test.claims import CLAIMS, line_of, unverified_lines, verdict
from benchmarks.gpu_test.registry import PARTS, Part
from benchmarks.gpu_test.report import as_markdown, read_report, write_report
from benchmarks.gpu_test.results import Check, PartResult, append_check, read_checks, status_of
from benchmarks.gpu_test.runner import Runner
from data_pipeline.errors import ConfigError, OutputExistsError
from tests.helpers.paths import ROOT

FACTS: dict[str, Any] = {
    "device": "cuda",
    "devices": [{"name": "H100", "memory_bytes": 80e9, "compute_capability": "9.0"}],
    "nvidia_smi": [],
    "packages": {"deepspeed": "1", "triton": None},
    "size": "full",
    **dict.fromkeys(("torch", "cuda", "cudnn", "nccl", "python", "system", "started"), "1"),
    "cores": 2,
    "megaback": "1",
}


def check(**fields: Any) -> Check:
    return Check(**{"name": "one", "status": "passed", **fields})


def result(name: str = "attention", **fields: Any) -> PartResult:
    usual = {"title": "t", "device": "cuda", "seconds": 1.0, "status": "passed"}
    return PartResult(**{"name": name, **usual, **fields})


# ---- results and report


def test_checks_of_a_killed_part_are_read_up_to_the_truncated_one(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    append_check(path, check(figures={"bytes": 3}))
    with path.open("a") as file:
        file.write('{"name": "tw')

    assert read_checks(path) == (check(figures={"bytes": 3}),)


@pytest.mark.parametrize(
    ("statuses", "problem", "status"),
    [
        (["passed", "skipped"], "", "passed"),
        (["passed", "failed"], "", "failed"),
        (["passed"], "was ended by SIGKILL", "failed"),
        (["measured", "skipped"], "", "measured"),
        (["skipped"], "", "skipped"),
        ([], "", "failed"),
    ],
)
def test_status_of_a_part(statuses: list[str], problem: str, status: str) -> None:
    assert status_of([check(status=one) for one in statuses], problem) == status


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = {"zero": result("zero", checks=(check(claim=CLAIMS[0], figures={"a": None}),))}
    write_report(tmp_path, FACTS, written)

    assert read_report(tmp_path) == (FACTS, written)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_every_claim_is_the_start_of_one_line_of_the_page() -> None:
    lines = unverified_lines()

    found = {claim: [line for line in lines if line.startswith(claim)] for claim in CLAIMS}
    assert {claim: len(starts) for claim, starts in found.items() if len(starts) != 1} == {}
    assert all(line_of(claim) == starts[0] for claim, starts in found.items())
    assert line_of("`no.such.key`") == "`no.such.key`"
    assert len(lines) > len(CLAIMS)


@pytest.mark.parametrize(
    ("device", "statuses", "word"),
    [
        ("cuda", ["passed", "measured"], "confirmed: strike"),
        ("cuda", ["passed", "skipped"], "confirmed in part"),
        ("cuda", ["skipped"], "did not run"),
        ("cuda", ["passed", "failed"], "FAILED"),
        ("cpu", ["passed"], "wants a GPU"),
    ],
)
def test_verdict_on_a_line(device: str, statuses: list[str], word: str) -> None:
    part = result(device=device)
    assert word in verdict([(part, check(status=status)) for status in statuses])


def test_the_report_names_lines_to_strike_and_those_without_a_check() -> None:
    text = as_markdown(FACTS, [result(checks=(check(claim=CLAIMS[0]),))])

    struck, _, others = text.partition("No check was about these:")
    assert f"**confirmed: strike what the checks below name**: {CLAIMS[0]}" in struck
    assert f"- {CLAIMS[0]}" not in others
    assert f"- {CLAIMS[1]}" in others


# ---- processes of parts


def run_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[Part, str], limit_s: float = 60
) -> dict[str, PartResult]:
    """Results of parts whose processes run other code; `out` there is their file of checks."""
    scripts = {part.name: code for part, code in parts.items()}
    passed = json.dumps({"name": "first", "status": "passed"})

    def command(names: tuple[str, ...], work: Path, _size: str) -> list[str]:
        out = f"import os, signal, time; out = open({str(work / names[0])!r} + '.jsonl', 'a')"
        code = f"{out}; print({passed!r}, file=out, flush=True); {scripts[names[0]]}"
        return [sys.executable, "-S", "-c", code]

    monkeypatch.setattr(runner_module, "part_command", command)
    results: dict[str, PartResult] = {}
    runner = Runner(
        tmp_path, "smoke", "cuda", lambda one: results.update({one.name: one}), jobs=2,
        limit_s=limit_s,
    )  # fmt: skip
    runner.run(list(parts))
    return results


def test_a_part_that_crashes_or_hangs_keeps_its_checks_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run_scripts(
        tmp_path,
        monkeypatch,
        {
            Part("killed", "", 60): "os.kill(os.getpid(), signal.SIGKILL)",
            Part("hangs", "", 1): "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
            Part("breaks", "", 60): "1 / 0",
            Part("works", "", 60): "pass",
        },
    )

    assert [one.status for one in map(results.get, ("killed", "hangs", "breaks", "works"))] == [
        *("failed", "failed", "failed", "passed"),
    ]
    assert "SIGKILL" in results["killed"].detail
    assert "limit of 1 s" in results["hangs"].detail
    assert "ended with 1" in results["breaks"].detail
    assert all(one.checks[0].name == "first" for one in results.values())


def test_parts_that_measure_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process fails if the mark of one that must not run beside it exists."""
    mark = tmp_path / "mark"
    enter = f"open({str(mark)!r}, 'x').close(); time.sleep(0.3); os.remove({str(mark)!r})"
    beside = f"assert not os.path.exists({str(mark)!r}); time.sleep(0.3)"
    parts = {
        Part("first", "", 60): beside,
        Part("second", "", 60): beside,
        Part("alone", "", 60, is_alone=True): enter,
        Part("alone_too", "", 60, is_alone=True): enter,
        Part("last", "", 60): beside,
    }

    started = time.monotonic()
    results = run_scripts(tmp_path, monkeypatch, parts)

    assert {one.status for one in results.values()} == {"passed"}
    assert results["first"].seconds + results["second"].seconds + 0.9 < (
        time.monotonic() - started + results["second"].seconds
    )


def test_time_for_all_parts_ends_those_that_run_and_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "_MIN_PART_S", 0.5)
    parts = {
        Part("first", "", 60, is_alone=True): "time.sleep(60)",
        Part("second", "", 60, is_alone=True): "time.sleep(60)",
    }

    results = run_scripts(tmp_path, monkeypatch, parts, limit_s=1.9)

    assert [one.detail.split(";")[0] for one in results.values()] == [
        "out of time after 2 s",
        "out of time",
    ]
    assert {one.status for one in results.values()} == {"skipped"}
    assert len(results["first"].checks) == 1


def test_an_interrupt_ends_the_processes_and_keeps_their_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PartResult] = []
    pid = tmp_path / "pid"
    code = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt(_seconds: float) -> None:
        if pid.exists() and pid.read_text() and read_checks(tmp_path / "one.jsonl"):
            monkeypatch.undo()
            raise KeyboardInterrupt

    def command(_names: object, work: Path, _size: str) -> list[str]:
        append_check(work / "one.jsonl", check())
        return [sys.executable, "-S", "-c", f"import os, time; {code}"]

    monkeypatch.setattr(runner_module, "part_command", command)
    monkeypatch.setattr(runner_module.time, "sleep", interrupt)
    runner = Runner(tmp_path, "smoke", "cuda", seen.append, jobs=1, limit_s=60)
    with pytest.raises(KeyboardInterrupt):
        runner.run([Part("one", "", 60)])

    assert [(one.detail, len(one.checks)) for one in seen][-1] == ("interrupted", 1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# ---- the command


def invoke(*words: object) -> Any:
    with patch.dict(os.environ):  # which the command sets for its parts
        return CliRunner().invoke(gpu_test.main, [str(word) for word in words])


def test_an_unknown_part_is_an_error_with_the_names_of_all() -> None:
    found = invoke("--parts", "attention,sped")

    assert found.exit_code == ConfigError.exit_code
    assert "sped" in found.stderr
    assert all(part.name in found.stderr for part in PARTS)


def test_a_folder_with_other_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()

    found = invoke("--out", tmp_path)

    assert found.exit_code == OutputExistsError.exit_code
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parts that a start runs; each ends at once, and attention fails."""
    names: list[str] = []

    class Recorder:
        def __init__(self, _work: object, _size: str, _device: str, record: Any, **_: Any) -> None:
            self.record: Callable[[PartResult], None] = record

        def run(self, parts: list[Part]) -> None:
            for part in parts:
                names.append(part.name)
                self.record(result(part.name, status="failed" if len(names) == 1 else "passed"))

    monkeypatch.setattr(gpu_test, "Runner", Recorder)
    monkeypatch.setattr(gpu_test, "_facts", lambda: {**FACTS})
    return names


def test_parts_of_an_earlier_start_are_kept_unless_again(tmp_path: Path, ran: list[str]) -> None:
    codes = [
        invoke("--out", tmp_path, "--parts", "zero,loss").exit_code,
        invoke("--out", tmp_path, "--parts", "loss,attention").exit_code,
        invoke("--out", tmp_path, "--parts", "zero", "--again").exit_code,
        invoke("--out", tmp_path).exit_code,
    ]

    assert ran[:4] == ["zero", "loss", "attention", "zero"]
    assert sorted(ran[4:]) == sorted({part.name for part in PARTS} - {*ran[:4]})
    assert codes == [1, 0, 0, 0]
    assert set(read_report(tmp_path)[1]) == {part.name for part in PARTS}


def test_a_report_of_another_machine_is_refused(
    tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("--out", tmp_path, "--parts", "zero")
    monkeypatch.setattr(gpu_test, "_facts", lambda: {**FACTS, "torch": "2"})

    found = invoke("--out", tmp_path, "--parts", "loss")

    assert found.exit_code == OutputExistsError.exit_code
    assert "(torch differ)" in found.stderr
    assert invoke("--out", tmp_path, "--parts", "loss", "--again").exit_code == 0
    assert list(read_report(tmp_path)[1]) == ["loss"]


def test_the_make_target_passes_its_variables_on() -> None:
    def commands(*variables: str) -> list[str]:
        done = subprocess.run(
            ["make", "-n", "gpu-test", *variables],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin"},
        )
        return " ".join(done.stdout.replace("\\\n", " ").split()).split("python")

    assert commands()[-1] == ' -m benchmarks.gpu_test --out "build/gpu-test" --minutes 8'
    last = commands("OUT=o", "PARTS=zero,loss", "MINUTES=4", "AGAIN=yes", "WHEELHOUSE=w")
    assert last[-1] == ' -m benchmarks.gpu_test --out "o" --minutes 4 --parts zero,loss --again'
    assert last[-2].endswith(".venv-gpu-test/bin/")
    assert any("--no-index --find-links w --no-deps -r w/requirements.txt" in one for one in last)
