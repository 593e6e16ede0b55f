"""Tables and text at 40 columns: everything is readable, and numbers are not cut."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from data_pipeline.build.options import echo_manifest
from data_pipeline.common.terminal import fit, print_table, table_lines, terminal_width
from data_pipeline.shards.manifest import Manifest
from launcher.doctor import Line, _print_table
from launcher.plan import main as plan
from launcher.slurm.jobs import Row, table
from megaback.scoring.bootstrap import Interval
from megaback.suites.accuracy import Metric
from tests.helpers.paths import ROOT
from tools.evaluate import _table
from tools.rerank import _report
from tools.suites.base import SuiteResult

WIDTH = 40


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


def require_readable(text: str, facts: Sequence[str]) -> None:
    """Every fact is complete, and only single words exceed the terminal's width."""
    words = text.split()
    missing = [fact for fact in facts if any(part not in words for part in fact.split())]
    assert not missing, text
    too_long = [line for line in text.splitlines() if len(line) > WIDTH]
    assert not [line for line in too_long if len(line.split()) > 1], text


@pytest.mark.usefixtures("narrow")
@given(st.lists(st.from_regex(r"[0-9,.]{1,12}|[a-z]{1,9}", fullmatch=True), max_size=40))
def test_a_line_is_wrapped_between_words(words: list[str]) -> None:
    line = f"val loss   {' '.join(words)}".rstrip()
    wrapped = fit(line)
    assert wrapped.split() == line.split()
    assert all(len(part) <= WIDTH for part in wrapped.split("\n"))
    assert all(part.startswith(" " * 11) for part in wrapped.split("\n")[1:])


def test_lines_are_not_wrapped_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    line = "word " * 100
    assert terminal_width() is None
    assert fit(line) == line
    assert len(table_lines(("a", "b"), [("x" * 300, "y")])) == 2


def test_the_width_is_that_of_the_terminal() -> None:
    code = "from data_pipeline.common.terminal import terminal_width; print(terminal_width())"
    leader, follower = os.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: text for name, text in os.environ.items() if name != "COLUMNS"}
    subprocess.run(
        [sys.executable, "-c", code], stdout=follower, env=environment, cwd=ROOT, check=True
    )
    assert os.read(leader, 100).split() == [str(WIDTH).encode()]
    os.close(leader)
    os.close(follower)


@pytest.mark.usefixtures("narrow")
def test_jobs_are_readable_at_40_columns() -> None:
    row = Row(
        run="runs/a-run-of-some-length",
        job="123456",
        stage="train",
        state="running",
        restarts=2,
        step=12_345,
        total_steps=100_000,
        loss=3.1415,
        to_train_s=86_400.0,
        job_left_s=7200,
        nodes="n1",
        why="2 ranks; step 12,345 began 3 s ago",
    )
    facts = ("runs/a-run-of-some-length", "123456", "running", "12,345/100,000", "3.1415")
    require_readable(table([row, row]), facts)


@pytest.mark.usefixtures("narrow")
def test_a_plan_is_readable_at_40_columns() -> None:
    words = [
        "configs/reverse_1b.yaml",
        "--nodes",
        "2",
        "--device-name",
        "h100-80gb",
        "--training-tokens",
        "1e10",
    ]
    config, *others = words
    result = CliRunner().invoke(plan, [str(ROOT / config), *others])
    assert result.exit_code == 0, result.output
    require_readable(result.output, ("GFLOP", "optimizer", "activations", "total", "h100-80gb"))
    amounts = re.findall(r"\d+\.\d\b", result.output)
    wide = CliRunner().invoke(plan, [str(ROOT / config), *others], env={"COLUMNS": "300"}).output
    assert sorted(amounts) == sorted(re.findall(r"\d+\.\d\b", wide))


@pytest.mark.usefixtures("narrow")
def test_tables_of_results_are_readable_at_40_columns(capsys: pytest.CaptureFixture[str]) -> None:
    interval = Interval(0.3234, 0.3011, 0.3508)
    result = SuiteResult(1234, {"word recall": Metric(interval, 1234, 0.0123)})
    for made in (
        _table({"instruction-recall": result}, "float32"),
        _report({"mixed": interval}, 1234, "float32"),
    ):
        print_table(Console(), made)
        require_readable(capsys.readouterr().out, ("0.323", "0.301 to 0.351"))


@pytest.mark.usefixtures("narrow")
def test_doctor_is_readable_at_40_columns(capsys: pytest.CaptureFixture[str]) -> None:
    _print_table(
        [Line("train on several hosts", "no", "does not work [here]", "apt-get install ssh")]
    )
    facts = ("train on several hosts", "does not work [here]", "apt-get install ssh")
    require_readable(capsys.readouterr().out, facts)


@pytest.mark.usefixtures("narrow")
def test_a_builds_summary_is_readable_at_40_columns(
    tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.load(tiny_shards)
    echo_manifest(manifest, tiny_shards)
    summary = capsys.readouterr().out.partition("next: ")[0]
    total = manifest.total("train")
    require_readable(summary, (f"{total['tokens']:,}", f"{total['text_bytes']:,}"))


def test_a_rich_table_is_printed_if_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    made = Table("name", "value")
    made.add_row("loss", "3.1415")
    print_table(Console(), made)
    assert "│ loss │ 3.1415 │" in capsys.readouterr().out
