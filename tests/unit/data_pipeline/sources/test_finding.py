"""Discovery of files, and counts of skipped ones."""

import bz2
import gzip
import json
import lzma
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner

from data_pipeline.build import plan_command
from data_pipeline.build.plan import Plan
from data_pipeline.errors import (
    BackendError,
    OutputExistsError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources.documents import Columns, Document
from data_pipeline.sources.registry import list_source, read_slice, require_outside
from tests.helpers.builds import Codecs, build_here, documents_of, make_settings
from tests.helpers.file_server import FileServer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".gzip": gzip.compress,
    ".GZ": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}
PAGE = (
    "<html><head><title>A page</title></head><body><nav><a href='/'>Home</a> About</nav><article>"
    f"<p>{'The old captain sold a broken lantern to the harbour master. ' * 8}</p></article>"
    "<footer>All rights reserved</footer></body></html>"
)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(source: Path | str, columns: Columns = Columns()) -> list[Document]:
    slices = list_source(str(source), columns).slices
    return [document for piece in slices for document in read_slice(piece, columns)]


def texts(source: Path | str, columns: Columns = Columns()) -> list[str]:
    return [document.text for document in read(source, columns)]


def excluded(source: Path | str, columns: Columns = Columns()) -> dict[str, int]:
    skipped = list_source(str(source), columns).skipped.get("files", {})
    return {cause: tally.count for cause, tally in skipped.items()}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonlines", "a.ndjson", "a.json"])
def test_records_are_read_with_every_compression(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](lines("one", "two")))
    assert texts(path) == texts(tmp_path) == texts(tmp_path / "a.*") == ["one", "two"]
    assert excluded(tmp_path) == {}


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_concatenated_streams_with_padding_are_read(tmp_path: Path, suffix: str) -> None:
    parts = [COMPRESS[suffix](lines(text)) for text in ("one", "two")]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(parts[0] + b"\0" * 8 + parts[1])
    assert texts(tmp_path) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".bz2", ".xz"])
def test_a_long_file_is_read_in_pieces_of_bounded_size(tmp_path: Path, suffix: str) -> None:
    data = lines("\0" * (4 << 20))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](data))
    assert texts(tmp_path) == ["\0" * (4 << 20)]


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".gzip"])
def test_a_file_that_is_truncated_or_has_trailing_garbage_is_unreadable(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = COMPRESS[suffix](lines(*map(str, range(50))))
    for broken in (*(whole[:length] for length in range(0, len(whole), 5)), whole + b"garbage"):
        path.write_bytes(broken)
        with pytest.raises(SourceUnreadableError, match=r"a\.jsonl.*truncated, or not"):
            texts(path)


def write_mixture(folder: Path) -> Path:
    """A folder with files that are typical of data folders."""
    for name in ("a.pdf", "b.pdf", "model.bin", "_SUCCESS", ".part.crc", "notes.txt", "page.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x80binary")
    (folder / ".git").mkdir()
    (folder / ".git" / "objects.txt").write_text("hidden")
    (folder / "part.jsonl").write_bytes(lines("one"))
    (folder / "log.tar.gz").write_bytes(b"")
    return folder


CAUSES = {
    "suffix .pdf is not read": 2,
    "suffix .bin is not read": 1,
    "suffix .tar.gz is not read": 1,
    "name without a suffix": 1,
    "an HTML page, which is read with `html`": 1,
}


def test_skipped_files_are_counted_by_suffix_and_cause(
    tmp_path: Path,
) -> None:
    folder = write_mixture(tmp_path / "data")
    assert texts(folder) == ["one"]
    beside = "text beside data, often a README or a license: name such files to read them"
    assert excluded(folder) == {**CAUSES, "hidden": 2, beside: 1}
    first = list_source(str(folder)).skipped["files"]["suffix .pdf is not read"].first
    assert first == (str(folder / "a.pdf"), str(folder / "b.pdf"))
    # Files matched by a pattern are read, texts next to data too.
    (folder / "notes.txt").write_text("read")
    assert sorted(texts(folder / "*.*")) == ["one", "read"]
    assert excluded(folder / "*") == CAUSES


def test_the_error_of_a_source_without_readable_files_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    with pytest.raises(SourceMissingError, match=r"1 file skipped: suffix \.pdf .*a\.pdf"):
        list_source(str(tmp_path))


def test_many_suffixes_are_counted_under_few_causes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    for day in range(100):
        (tmp_path / f"log.{day:04d}").touch()
    counted = excluded(tmp_path)
    assert (len(counted), sum(counted.values())) == (31, 100)


def test_linked_folders_are_read_once_and_cycles_end(tmp_path: Path) -> None:
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    for folder in (elsewhere / "deep", data / "real"):
        folder.mkdir(parents=True)
    (elsewhere / "deep" / "far.jsonl").write_bytes(lines("far"))
    (data / "real" / "near.jsonl").write_bytes(lines("near"))
    (data / "b_link").symlink_to(elsewhere)
    (data / "a_again").symlink_to(data / "real")
    (data / "real" / "up").symlink_to("..")
    (data / "outside").symlink_to(tmp_path)
    (elsewhere / "deep" / "loop").symlink_to(elsewhere)
    found = [document.position for document in read(data)]
    assert found == ["far.jsonl:1", "near.jsonl:1"]
    slices = [piece.path for piece in list_source(str(data)).slices]
    assert slices == [str(data / "b_link/deep/far.jsonl"), str(data / "real/near.jsonl")]
    assert excluded(data) == {"link to a folder that is read already": 4}


def test_an_output_in_a_folder_linked_from_the_source_is_refused(
    tmp_path: Path, codec: Codecs
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "scratch")
    settings = make_settings(tmp_path / "data", codec())
    with pytest.raises(OutputExistsError, match="would become part of it"):
        build_here(settings, codec(), tmp_path / "scratch" / "shards")
    assert not (tmp_path / "scratch" / "shards").exists()


def test_a_pattern_that_follows_cyclic_links_reads_each_file_once(
    tmp_path: Path,
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_bytes(lines("one"))
    (tmp_path / "x" / "b.pdf").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "x")
    for pattern in ("**", "**/*", "**/*.jsonl", "*/**"):
        (piece,) = list_source(str(tmp_path / pattern)).slices
        assert piece.path == str(tmp_path / "x" / "a.jsonl")
    assert excluded(tmp_path / "**" / "*.*") == {"suffix .pdf is not read": 1}


def test_a_pipe_is_skipped(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SourceMissingError, match="not a regular file"):
        list_source(str(tmp_path / "pipe.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(lines("one"))
    assert texts(tmp_path) == ["one"]
    assert excluded(tmp_path) == {"not a regular file": 1}


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_files_within_a_zip_are_read_like_those_of_a_folder(tmp_path: Path) -> None:
    members = {
        "data/": b"",
        "data/b.jsonl": lines("one", "two"),
        "data/a.jsonl.gz": gzip.compress(lines("three")),
        "README.md": b"about",
        "data/a.parquet": b"PAR1",
        "__MACOSX/._b.jsonl": b"\0",
        "picture.png": b"\0",
    }
    path = write_zip(tmp_path / "a.zip", members)
    found = read(path)
    assert [document.text for document in found] == ["one", "two", "three"]
    assert excluded(tmp_path) == {
        "hidden": 1,
        "suffix .parquet is not read within a zip": 1,
        "suffix .png is not read within a zip": 1,
        "text beside data within a zip": 1,
    }


def test_a_zip_of_texts_is_read_with_texts_and_skipped_next_to_data(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"one.txt": b"one", "two.txt": b"two"})
    (tmp_path / "three.txt").write_text("three")
    assert texts(tmp_path) == ["one", "two", "three"]
    (tmp_path / "data.jsonl").write_bytes(lines("four"))
    assert texts(tmp_path) == ["four"]


def test_the_slices_of_a_large_zip_join_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.sources.zip_files._SLICE_BYTES", 30)
    members = {f"{number}.txt": b"x" * 10 + b"%d" % number for number in range(7)}
    path = write_zip(tmp_path / "a.zip", members)
    slices = list_source(str(path)).slices
    assert [(piece.start, piece.stop) for piece in slices] == [(0, 3), (3, 6), (6, 7)]
    assert texts(path) == [data.decode() for data in members.values()]


def test_a_broken_zip_is_unreadable(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.jsonl": lines(*map(str, range(500)))})
    whole = bytearray(path.read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceUnreadableError, match=r"a\.zip: truncated"):
        texts(path)
    whole[200] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(SourceUnreadableError, match=r"a\.zip/a\.jsonl: truncated, or not"):
        texts(path)


def test_remote_archives_and_compressed_files_are_read(server: FileServer, tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", {"a.jsonl.bz2": bz2.compress(lines("one"))})
    server.files["a.zip"] = (tmp_path / "a.zip").read_bytes()
    server.files["a.jsonl.xz"] = lzma.compress(lines("two"))
    assert texts(server.url("a.zip")) == ["one"]
    assert texts(server.url("a.jsonl.xz")) == ["two"]


def test_skipped_files_of_a_remote_folder_are_counted(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b.pdf", ".hidden", "deep/.cache/x.jsonl"):
        memory.pipe(f"/finding/{name}", lines("one"))
    assert texts("memory://finding") == ["one"]
    assert excluded("memory://finding") == {"hidden": 2, "suffix .pdf is not read": 1}
    memory.rm("/finding", recursive=True)


def test_the_main_text_of_html_pages_is_read_on_request(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura", reason="the extra `html` is not installed")
    (tmp_path / "a.html").write_text(PAGE)
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(PAGE.encode()))
    (tmp_path / "c.txt").write_text("text")
    write_zip(tmp_path / "d.zip", {"e.xhtml": PAGE.encode()})
    assert texts(tmp_path) == ["text"]
    assert excluded(tmp_path)["an HTML page, which is read with `html`"] == 3
    page, again, text, zipped = texts(tmp_path, Columns(html=True))
    assert page == again == zipped
    assert page.startswith("The old captain sold")
    assert "Home" not in page
    assert text == "text"


def test_html_without_its_reader_is_refused_during_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    (tmp_path / "a.html").write_text(PAGE)
    write_zip(tmp_path / "b.zip", {"a.html": PAGE.encode()})
    for name in ("a.html", "b.zip"):
        with pytest.raises(BackendError, match=r"`html` needs trafilatura.*megaback\[html\]"):
            list_source(str(tmp_path / name), Columns(html=True))


def test_a_plan_reports_skipped_files(tmp_path: Path, tokenizer_path: Path) -> None:
    given = ["--source", str(write_mixture(tmp_path / "data")), "--tokenizer", str(tokenizer_path)]
    result = CliRunner().invoke(plan_command.main, [*given, "--out", str(tmp_path / "out")])
    assert "2 files skipped: suffix .pdf is not read" in result.stdout
    assert Plan.load(tmp_path / "out").skipped["files"]["hidden"].count == 2


def test_skipped_files_are_in_the_manifest_for_any_number_of_workers(
    tmp_path: Path, codec: Codecs, a_task_a_file: None
) -> None:
    folder = write_mixture(tmp_path / "data")
    (folder / "more.jsonl.bz2").write_bytes(bz2.compress(lines("two")))
    settings = make_settings(folder, codec(), val_fraction=0.0)
    manifests = [
        build_here(settings, codec(), tmp_path / f"out{workers}", workers) for workers in (1, 3)
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0].skipped["files"]["suffix .pdf is not read"].count == 2
    assert documents_of(tmp_path / "out1")["train"] == ["two", "one"]


@pytest.mark.parametrize(
    ("pattern", "is_within"),
    [("**", True), ("**/*.json", True), ("**/*.jsonl", False), ("*", False), ("*.json", False)],
)
def test_a_pattern_that_matches_the_output_is_refused(
    pattern: str, is_within: bool, tmp_path: Path
) -> None:
    source, out = f"{tmp_path}/{pattern}", tmp_path / "shards"
    if is_within:
        with pytest.raises(OutputExistsError, match="is within the source"):
            require_outside(source, out)
    else:
        require_outside(source, out)
