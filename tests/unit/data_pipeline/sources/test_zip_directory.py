"""Zip bombs and invalid archives."""

import io
import json
import re
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import MegabackError, SourceMissingError, SourceUnreadableError
from data_pipeline.sources.registry import list_slices, list_source, read_slice

TEXTS = ["one", "two", "three"]
_END = struct.Struct("<4s4H2LH")


def archive(method: int = zipfile.ZIP_DEFLATED, names: str = "{}.jsonl") -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for text in TEXTS:
            file.writestr(names.format(text), json.dumps({"text": text}) + "\n")
    return bytearray(buffer.getvalue())


def texts(path: Path) -> list[str]:
    return [document.text for piece in list_slices(str(path)) for document in read_slice(piece)]


def entries(data: bytes) -> list[int]:
    """Start positions of the directory's entries."""
    return [match.start() for match in re.finditer(b"PK\x01\x02", data)]


def patch(data: bytearray, entry: int, field: str, value: int) -> None:
    """Change a file's field in the directory."""
    place = {"file_size": 24, "header_offset": 42}[field]
    start = entries(data)[entry] + place
    data[start : start + 4] = struct.pack("<L", value)


def test_overlapping_files_are_refused(tmp_path: Path) -> None:
    data = archive()
    patch(data, 1, "header_offset", 0)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceUnreadableError, match="its files overlap, as in a zip bomb"):
        texts(tmp_path / "a.zip")


def test_implausible_expanded_sizes_are_refused(tmp_path: Path) -> None:
    data = archive()
    patch(data, 2, "file_size", (1 << 32) - 2)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceUnreadableError, match=r"claim to expand to 4,294,967,\d+ bytes"):
        texts(tmp_path / "a.zip")


def test_a_file_is_read_up_to_its_size(tmp_path: Path) -> None:
    data = archive()
    patch(data, 0, "file_size", 5)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(MegabackError, match=r"one\.jsonl"):
        texts(tmp_path / "a.zip")


def test_a_large_directory_is_refused(tmp_path: Path) -> None:
    size_bytes = (32 << 20) + 1
    with (tmp_path / "a.zip").open("wb") as file:
        file.truncate(size_bytes)
        file.seek(size_bytes)
        file.write(_END.pack(b"PK\x05\x06", 0, 0, 0xFFFE, 0xFFFE, size_bytes, 0, 0))
    with pytest.raises(SourceUnreadableError, match=r"its directory has 33,554,433 bytes"):
        texts(tmp_path / "a.zip")


@pytest.mark.parametrize("offset", [1 << 31, 0xFFFFFFFE])
def test_a_directory_beyond_the_end_is_refused(tmp_path: Path, offset: int) -> None:
    data = archive()
    end = data.rindex(b"PK\x05\x06")
    data[end + 16 : end + 20] = struct.pack("<L", offset)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(SourceUnreadableError, match=r"a\.zip: truncated, or not"):
        texts(tmp_path / "a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_methods_without_bounded_reads_are_refused(tmp_path: Path, method: int) -> None:
    (tmp_path / "a.zip").write_bytes(archive(method))
    with pytest.raises(SourceUnreadableError, match=rf"number {method}\); unpack the archive"):
        texts(tmp_path / "a.zip")


def test_names_with_parent_folders_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.zip"
    path.write_bytes(archive(names="/{}.jsonl"))
    assert texts(path) == TEXTS
    for names in ("../{}.jsonl", "a/../../{}.jsonl"):  # components that begin with a dot are hidden
        path.write_bytes(archive(names=names))
        with pytest.raises(SourceMissingError, match="3 files skipped: hidden"):
            texts(path)
    assert [*tmp_path.rglob("*.jsonl")] == []


def test_a_file_without_a_name_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(archive()).replace(b"two.jsonl", b"\0wo.jsonl"))  # names end at a zero
    assert texts(path) == ["one", "three"]
    (cause,) = list_source(str(path)).skipped["files"]
    assert cause == "without a name within a zip"


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=4), st.data())
def test_an_altered_archive_is_read_or_refused(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    altered = archive()
    directory = entries(altered)[0]
    for at, change in changes:
        # Most changes are in the directory, which has the most effect.
        start = directory if at % 4 else 0
        altered[start + at % (len(altered) - start)] ^= change
    del altered[data.draw(st.just(len(altered)) | st.integers(0, len(altered))) :]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.zip"
        path.write_bytes(altered)
        with suppress(MegabackError):
            texts(path)
