"""Error messages and exit codes of all commands."""

import errno
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data_pipeline.common.command import Command
from data_pipeline.common.unquoted import pattern_options
from data_pipeline.errors import BatchError, ConfigError, MegabackError, UserInterruptError
from data_pipeline.shards import inspection
from data_pipeline.shards.manifest import Manifest
from megaback.cli import command_modules
from tests.helpers.paths import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]


def error_classes(parent: type[MegabackError] = MegabackError) -> Iterator[type[MegabackError]]:
    for child in parent.__subclasses__():
        yield child
        yield from error_classes(child)


def failing_command(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    def main() -> None:
        raise error

    return main


def test_every_error_class_has_its_own_exit_code() -> None:
    codes = [error.exit_code for error in error_classes()]
    assert sorted(codes) == sorted(set(codes))


def test_exit_codes_are_not_those_of_a_crash_a_usage_error_or_the_shell() -> None:
    """Ctrl-C has the shell's code."""
    codes = {error.exit_code for error in error_classes()} - {UserInterruptError.exit_code}
    assert codes <= set(range(3, 126))


def test_the_documentation_lists_every_code_with_its_error() -> None:
    page = ROOT / "docs" / "exit_codes.md"
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(code): name for code, name in rows} == {
        error.exit_code: error.__name__ for error in (MegabackError, *error_classes())
    }


def test_every_error_class_has_a_docstring() -> None:
    assert [error.__name__ for error in error_classes() if not error.__doc__] == []


def test_a_bad_batch_and_a_bad_config_have_different_codes() -> None:
    assert BatchError.exit_code != ConfigError.exit_code


@pytest.mark.parametrize("error", list(error_classes()), ids=lambda error: error.__name__)
def test_an_error_is_reported_with_its_message_and_code(error: type[MegabackError]) -> None:
    result = CliRunner().invoke(failing_command(error("what, where, what to do")), [])
    assert (result.exit_code, result.stderr) == (
        error.exit_code,
        "megaback: error: what, where, what to do\n",
    )


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of your quota"),
        (errno.EROFS, "choose a path"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check the path"),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_system_error_is_reported_with_path_and_advice(number: int, advice: str) -> None:
    error = OSError(number, os.strerror(number), "some/path")
    result = CliRunner().invoke(failing_command(error), [])
    (line,) = result.stderr.splitlines()
    wanted = ("megaback: error: ", "'some/path'", os.strerror(number), advice)
    assert (result.exit_code, [part for part in wanted if part not in line]) == (74, [])


def test_a_defect_keeps_its_traceback() -> None:
    result = CliRunner().invoke(failing_command(ZeroDivisionError()), [])
    assert isinstance(result.exception, ZeroDivisionError)


def require_one_line(result: subprocess.CompletedProcess[str], code: int) -> None:
    # A build of more than ten seconds, on a busy machine, reports progress too.
    lines = result.stderr.splitlines()
    lines = [line for line in lines if not line.startswith('{"event": "build"')]
    assert (result.returncode, len(lines), lines[-1:]) == (code, 1, lines)
    assert lines[0].startswith("megaback: error: ")
    assert "Traceback" not in result.stdout + result.stderr


def test_a_missing_source_is_reported(
    run_megaback: Run, tokenizer_path: Path, tmp_path: Path
) -> None:
    result = run_megaback(
        *("shards", "build", "--source", tmp_path / "nowhere"),
        *("--tokenizer", tokenizer_path, "--out", tmp_path / "shards"),
    )
    require_one_line(result, 20)


def test_a_bad_record_is_reported_with_its_line(
    run_megaback: Run, tokenizer_path: Path, tmp_path: Path
) -> None:
    """The error is raised in a worker process."""
    source = tmp_path / "bad.jsonl"
    source.write_text('{"text": "good"}\n{"text": "cut')
    result = run_megaback(
        *("shards", "build", "--source", source),
        *("--tokenizer", tokenizer_path, "--out", tmp_path / "shards"),
    )
    require_one_line(result, 23)
    assert f"{source}:2" in result.stderr


def test_a_missing_tokenizer_is_reported(
    run_megaback: Run, tiny_text_folder: Path, tmp_path: Path
) -> None:
    result = run_megaback(
        *("shards", "build", "--source", tiny_text_folder),
        *("--tokenizer", tmp_path / "nowhere.model", "--out", tmp_path / "shards"),
    )
    require_one_line(result, 24)


def test_an_output_below_a_file_is_reported(
    run_megaback: Run, tiny_text_folder: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = run_megaback(
        *("shards", "build", "--source", tiny_text_folder),
        *("--tokenizer", tokenizer_path, "--out", tmp_path / "file" / "shards"),
    )
    require_one_line(result, 74)


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_folder_without_shards_is_reported(
    run_megaback: Run, tmp_path: Path, command: str
) -> None:
    require_one_line(run_megaback("shards", command, tmp_path), 30)


@pytest.mark.parametrize("command", ["verify", "inspect", "finalize"])
def test_a_file_in_place_of_a_folder_of_shards_is_not_a_storage_error(
    run_megaback: Run, tmp_path: Path, command: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    require_one_line(run_megaback("shards", command, tmp_path / "rows.jsonl"), 30)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": "megaback-shards"}'])
def test_a_broken_manifest_is_reported(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    result = CliRunner().invoke(inspection.main, [str(tmp_path)])
    assert (result.exit_code, len(result.stderr.splitlines())) == (31, 1)


def test_a_document_beyond_the_end_is_reported(run_megaback: Run, tiny_shards: Path) -> None:
    result = run_megaback("shards", "inspect", tiny_shards, "--document", 10**6)
    require_one_line(result, 10)


def test_a_closed_pipe_is_not_reported(tiny_shards: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "megaback", "shards", "inspect", str(tiny_shards)]
    result = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write_end)
    assert result.stderr == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)],
        capture_output=True,
        check=False,
    )
    if mounting.returncode:
        pytest.skip("mounting a file system needs root")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(disk: Path, free_bytes: int) -> Path:
    """A file that leaves `free_bytes` of a disk."""
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - free_bytes))
    return filler


@pytest.mark.parametrize("free_bytes", [0, 8192])
def test_a_full_disk_is_reported_and_the_build_resumes_with_space(
    run_megaback: Run,
    tiny_text_folder: Path,
    tokenizer_path: Path,
    small_disk: Path,
    free_bytes: int,
) -> None:
    filler = fill(small_disk, free_bytes)
    out = small_disk / "shards"
    command = (
        *("shards", "build", "--source", tiny_text_folder, "--workers", 1),
        *("--tokenizer", tokenizer_path, "--out", out),
    )
    require_one_line(run_megaback(*command), 74)
    assert not (out / "manifest.json").exists()
    filler.unlink()
    result = run_megaback(*command)
    assert (result.returncode, result.stderr) == (0, "")
    assert Manifest.load(out).total("train")["documents"] > 300


def test_the_error_of_a_full_disk_names_a_path_on_it(
    run_megaback: Run, tiny_text_folder: Path, tokenizer_path: Path, small_disk: Path
) -> None:
    fill(small_disk, 8192)
    result = run_megaback(
        *("shards", "build", "--source", tiny_text_folder, "--workers", 1),
        *("--tokenizer", tokenizer_path, "--out", small_disk / "shards"),
    )
    assert str(small_disk) in result.stderr


SOURCE_COMMANDS = {
    "shards build": ["--tokenizer", "t.model", "--out", "out"],
    "shards plan": ["--tokenizer", "t.model", "--out", "out"],
    "tokenizer train": ["--out", "out"],
    "instruct build": ["--tokenizer", "t.model", "--out", "out"],
    "import shards": ["--tokenizer", "t.model", "--out", "out"],
    "submit": ["--chain", "data,train"],
    "backtranslate": ["--out", "out"],
    "eval": ["--suite", "passage-choice"],
}
SOURCE_OPTIONS = {"backtranslate": "--in", "eval": "--passages"}


def _command(name: str) -> click.Command:
    command: click.Command = importlib.import_module(command_modules()[name]).main
    return command


def test_all_commands_with_patterns_are_tested() -> None:
    found = {name for name in command_modules() if pattern_options(_command(name))}
    assert found == set(SOURCE_COMMANDS)


@pytest.mark.parametrize("name", SOURCE_COMMANDS)
def test_the_error_of_an_unquoted_pattern_quotes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [f"my data/part {number}.jsonl" for number in (1, 2, 3)]
    (tmp_path / "my data").mkdir()
    for file in files:
        (tmp_path / file).touch()
    option = SOURCE_OPTIONS.get(name, "--source")
    first = ["config.yaml"] if name in ("submit", *SOURCE_OPTIONS) else []
    words = [*first, option, *files, *SOURCE_COMMANDS[name]]
    result = CliRunner().invoke(_command(name), words)
    assert result.exit_code == 2
    shown = " ".join(result.output.split())
    assert f"{option} takes one value, and 3 files follow it" in shown
    assert shown.endswith(f"Quote it: {option} 'my data/part *.jsonl'")
    once = CliRunner().invoke(_command(name), [*first, option, files[0], *SOURCE_COMMANDS[name]])
    assert "pattern" not in once.output


def test_the_error_of_an_unquoted_text_quotes_it() -> None:
    words = ["model", "--ending", "the", "very", "end.", "--num-samples", "2"]
    result = CliRunner().invoke(_command("sample"), words)
    assert (result.exit_code, "--ending 'the very end.'" in result.output) == (2, True)


@pytest.mark.parametrize("words", [["--out", "", "x"], ["--out=", "x"], ["--out", "a", ""]])
def test_an_empty_path_is_not_the_working_directory(words: list[str]) -> None:
    @click.command(cls=Command)
    @click.argument("folder", type=click.Path(path_type=Path))
    @click.option("--out", type=click.Path())
    @click.option("--text", default="")
    def command(folder: Path, out: str, text: str) -> None:
        click.echo(f"{folder} {out} {text!r}")

    refused = CliRunner().invoke(command, words)
    assert refused.exit_code == 2, refused.output
    assert "it is empty, perhaps from an unset shell variable; give a path" in refused.stderr
    fine = CliRunner().invoke(command, ["--out", "a", "--text", "", "x"])
    assert fine.stdout == "x a ''\n"
