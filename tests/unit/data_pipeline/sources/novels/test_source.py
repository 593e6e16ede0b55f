"""The novels that come with megaback: what is read of them, and that it is what README.md names."""

import bz2
import re
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.documents import Document
from data_pipeline.sources.novels import source
from data_pipeline.sources.registry import list_slices, read_slice

FOLDER = Path(source.__file__).parent
ROWS = re.findall(
    r"^\| `(\w+)\.jsonl\.bz2` \| (\d+) \| `(\w+)` \|$",
    *[(FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE],
)


@pytest.fixture(scope="module")
def chapters() -> dict[str, list[Document]]:
    return {piece.path: list(read_slice(piece)) for piece in list_slices("novels")}


def test_files_chapters_and_hashes_equal_those_of_the_readme(
    chapters: dict[str, list[Document]],
) -> None:
    found = [
        (piece.path, str(len(chapters[piece.path])), piece.stamp) for piece in list_slices("novels")
    ]
    assert found == ROWS


def test_novels_are_complete_from_the_first_to_the_last_sentence(
    chapters: dict[str, list[Document]],
) -> None:
    austen, melville = chapters["pride_and_prejudice"], chapters["moby_dick"]
    assert austen[0].text.startswith("It is a truth universally acknowledged, that a single man")
    assert austen[-1].text.endswith("had been the means of uniting them.")
    assert austen[-1].position == "Pride and Prejudice, chapter 61"
    assert melville[0].text.startswith("Call me Ishmael. Some years ago—never mind how long")
    assert melville[-1].text.endswith("only found another orphan.")


def test_headings_markup_and_line_wrapping_are_removed(chapters: dict[str, list[Document]]) -> None:
    text = "\n\n".join(document.text for novel in chapters.values() for document in novel)
    assert not re.search(r"gutenberg|^finis\b|^the end$|^chapter|^volume", text, re.I | re.M)
    assert not set("_*#<>{}\\|“”‘’\t\r") & set(text)
    assert not re.search(r"  |--|\n{3}|\n | \n", text)
    assert sum(len(line) for line in text.split("\n")) / text.count("\n\n") > 300  # unwrapped


def test_a_novel_of_another_version_is_refused() -> None:
    piece = list_slices("novels")[0]
    for other in (replace(piece, stamp="0" * 64), replace(piece, path="../../../etc/passwd")):
        with pytest.raises(SourceUnreadableError):
            list(read_slice(other))


def test_an_installation_without_the_texts_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "_FOLDER", tmp_path)
    with pytest.raises(SourceUnreadableError, match="install megaback again"):
        list_slices("novels")


def test_the_texts_compress_to_the_same_bytes() -> None:
    """As `rebuild.py` compresses, whatever the version of bzip2."""
    stored = (FOLDER / "northanger_abbey.jsonl.bz2").read_bytes()
    assert bz2.compress(bz2.decompress(stored)) == stored
