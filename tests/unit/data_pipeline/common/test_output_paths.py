"""Outputs: never an input or a foreign file, an earlier result only with --overwrite."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.common.atomic import write_text
from data_pipeline.common.output_folder import MARKER_NAME, require_output_folder, whole_folder
from data_pipeline.common.output_paths import (
    file_with_mark,
    json_lines_with,
    json_object_with,
    require_distinct,
    require_output,
    write_output,
    writing_output,
)
from data_pipeline.errors import OutputExistsError

OURS = '{"score": {}}\n'
is_score = json_lines_with(score=dict)


def ask(out: Path, *inputs: object, overwrite: bool = False) -> None:
    require_output(out, inputs, is_ours=is_score, overwrite=overwrite)  # type: ignore[arg-type]


def itself(rows: Path, out: Path) -> None:
    rows.rename(out)
    rows.symlink_to(out)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "a hard link": lambda rows, out: os.link(rows, out),
    "a symbolic link": lambda rows, out: out.symlink_to(rows),
    "the target of a symbolic link": itself,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_output_that_is_an_input_is_refused_even_with_overwrite(
    way: str, tmp_path: Path
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(OURS)
    WAYS[way](rows, out)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="the input"):
            ask(out, rows, overwrite=overwrite)
    assert rows.read_text() == OURS


@pytest.mark.parametrize("given", ["{folder}/rows.jsonl", "{folder}", "{folder}/*.jsonl"])
def test_inputs_are_files_folders_and_patterns(given: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(OURS)
    source = given.format(folder=tmp_path)

    with pytest.raises(OutputExistsError, match="the input"):
        ask(tmp_path / "rows.jsonl", None, "-", "hf:NAME", source, overwrite=True)


def test_an_output_within_an_input_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()

    with pytest.raises(OutputExistsError, match="is within"):
        ask(tmp_path / "texts" / "deep" / "new.jsonl", str(tmp_path / "texts"))


def test_a_foreign_file_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    for text in ('{"text": 1}\n', "no JSON", OURS + '{"text": "added"}\n', "[" * 100_000):
        out.write_text(text)
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match="did not write"):
                ask(out, overwrite=overwrite)


def test_an_earlier_result_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(OURS * 3)
    with pytest.raises(OutputExistsError, match="`overwrite`"):
        ask(out)

    ask(out, overwrite=True)


def test_empty_files_and_dangling_links_are_vacant(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere.jsonl")

    for name in ("absent.jsonl", "empty.jsonl", "dangling.jsonl"):
        ask(tmp_path / name, tmp_path / "also absent")


def test_pipes_and_devices_are_written_to_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, Path(os.devnull)):
        ask(path)
        write_output(path, "through", overwrite=False)

    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    assert Path(os.devnull).is_char_device()


def test_links_are_followed_by_outputs_and_replaced_by_own_files(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "out.json", tmp_path / "out.json"
    link.symlink_to(target)

    write_output(link, "written", overwrite=False)

    assert link.is_symlink()
    assert target.read_text() == "written"

    write_text(link, "in its place")

    assert not link.is_symlink()
    assert (link.read_text(), target.read_text()) == ("in its place", "written")


def test_links_to_devices_are_followed_by_outputs_and_replaced_by_own_files(tmp_path: Path) -> None:
    link = tmp_path / "out.json"
    link.symlink_to(os.devnull)

    write_output(link, "gone", overwrite=True)
    assert link.is_symlink()

    write_text(link, "here")
    assert link.read_text() == "here"


@pytest.fixture(params=["links", "no links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with and without hard links; many memory cards have none."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("file_system")
def test_a_file_created_while_a_command_runs_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    for name in ("out.jsonl", "link.jsonl"):
        output = writing_output(tmp_path / name, overwrite=False)
        output.__enter__().write(b"the result")
        (tmp_path / "out.jsonl").write_text("mine")
        with pytest.raises(OutputExistsError, match="and is kept; the result is") as refused:
            output.__exit__(None, None, None)
        (kept,) = set(tmp_path.iterdir()) - {tmp_path / "out.jsonl", tmp_path / "link.jsonl"}
        assert kept.read_text() == "the result"
        assert (kept.suffix, str(kept) in str(refused.value)) == (".jsonl", True)
        kept.unlink()
        assert (tmp_path / "out.jsonl").read_text() == "mine"
        (tmp_path / "out.jsonl").unlink()


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_replaces_an_empty_file(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "empty.json").touch()
    for name in ("empty.json", "absent.json"):
        write_output(tmp_path / name, "the result", overwrite=overwrite)
        assert (tmp_path / name).read_text() == "the result"
    write_output(tmp_path / "empty.json", "again", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["absent.json", "empty.json"]


def test_two_outputs_cannot_be_the_same_file(tmp_path: Path) -> None:
    require_distinct(out="-", report="-")
    require_distinct(out=tmp_path / "a", report=None, predictions=tmp_path / "b")

    with pytest.raises(OutputExistsError, match="`out` and `report` are the same file"):
        require_distinct(out=str(tmp_path / "x" / ".." / "a"), report=tmp_path / "a")


def test_formats_are_recognized_by_their_contents(tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.write_text(json.dumps({"model": 1, "suites": 2}))
    assert json_object_with("model", "suites")(path)
    assert not json_object_with("model", "questions")(path)
    assert not is_score(path)
    assert file_with_mark(b"suites")(path)
    assert not file_with_mark(b"suite ")(path)
    assert not is_score(tmp_path)


def write_model(out: Path, text: str, *, overwrite: bool = False) -> None:
    with whole_folder(out, overwrite=overwrite) as folder:
        (folder / "weights").write_text(text)


def test_an_earlier_folder_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write_model(out, "old")
    with pytest.raises(OutputExistsError, match="`overwrite`"):
        write_model(out, "new")
    assert (out / "weights").read_text() == "old"

    write_model(out, "new", overwrite=True)

    assert (out / "weights").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write_model(out, "old")

    with pytest.raises(ZeroDivisionError), whole_folder(out, overwrite=True):
        raise ZeroDivisionError

    assert (out / "weights").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [("notes.txt", "mine", "added"), ("weights", "tuned", "changed"), (MARKER_NAME, "{}", "model")],
)
def test_a_folder_with_changed_files_is_never_replaced(
    name: str, text: str, reason: str, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    write_model(out, "old")
    (out / name).write_text(text)

    with pytest.raises(OutputExistsError, match=reason):
        write_model(out, "new", overwrite=True)

    assert (out / name).read_text() == text


def test_a_folder_with_an_added_link_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "model"
    write_model(out, "old")
    (out / "data").symlink_to(tmp_path)

    with pytest.raises(OutputExistsError, match="added"):
        write_model(out, "new", overwrite=True)


def test_a_folder_is_not_written_into_an_input_or_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "model", tmp_path):
        with pytest.raises(OutputExistsError, match="the input"):
            require_output_folder(out, (tmp_path,), overwrite=True)
    with pytest.raises(OutputExistsError, match="a file"):
        require_output_folder(tmp_path / "file", overwrite=True)
