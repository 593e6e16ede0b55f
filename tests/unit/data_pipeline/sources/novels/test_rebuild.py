"""The rebuild of the novels: R's format, and what is taken of a book."""

import struct
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.novels.rebuild import chapters_of, main, novels_of

BOOK = """\
A NOVEL

VOLUME I

CHAPTER I

The first line of a paragraph
goes on in the _second_ one.

"Indeed!"--said she.

     "My dear Madam,

     "I have the honour of
     your letter.

  The course of true love
    Never did run smooth

          * * * * *

VOLUME II

Chapter 2

The rest.*

*A footnote.
[At this point in the first edition, Volume I ends.]

THE END

A NOTE ON THE TEXT

By an editor.
"""


def serialized(lines: list[str]) -> bytes:
    """A vector of strings as R's `serialize` writes it, version 3."""
    parts = [b"X\n", struct.pack(">iiii", 3, 0x40201, 0x30500, 5), b"UTF-8"]
    parts.append(struct.pack(">ii", 16, len(lines)))
    for line in lines:
        parts += [struct.pack(">ii", 0x40009, len(line.encode())), line.encode()]
    return b"".join(parts)


def test_vectors_of_strings_are_read_from_a_database_of_r() -> None:
    novels = [["Emma", "", "£5"], ["Persuasion"]]
    stored = [serialized(lines) for lines in novels]
    database = b"".join(struct.pack(">i", len(one)) + zlib.compress(one) for one in stored)
    assert list(novels_of(database)) == novels


def test_other_types_of_r_objects_are_refused() -> None:
    numbers = serialized(["a"]).replace(struct.pack(">ii", 16, 1), struct.pack(">ii", 14, 1))
    with pytest.raises(ValueError, match="found type 14"):
        list(novels_of(bytes(4) + zlib.compress(numbers)))


def test_chapters_are_unwrapped_paragraphs_without_headings() -> None:
    first, second = chapters_of(BOOK.split("\n"))
    assert first.split("\n\n") == [
        "The first line of a paragraph goes on in the second one.",
        '"Indeed!"—said she.',
        '"My dear Madam,',
        '"I have the honour of your letter.',
        "The course of true love\nNever did run smooth",
    ]
    assert second == "The rest."


def test_another_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.deb").write_bytes(b"!<arch>\n")
    result = CliRunner().invoke(main, [str(tmp_path / "a.deb")] * 2)
    assert result.exit_code == SourceUnreadableError.exit_code
    assert "name the package of the version above" in result.output
