"""English novels included in megaback: six by Jane Austen, and Moby Dick.

One document is one chapter. README.md lists the origins of the texts.
"""

import bz2
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.documents import Document, Slice, require_stamp

_FOLDER = Path(__file__).parent
_SUFFIX = ".jsonl.bz2"


def list_novels_slices() -> tuple[Slice, ...]:
    """The novels, in alphabetical order. Raises SourceUnreadableError when there are none."""
    files = _files()
    if not files:
        raise SourceUnreadableError(f"novels: no texts in {_FOLDER}; install megaback again")
    return tuple(
        Slice(
            kind="novels",
            path=name,
            start=0,
            stop=1,
            size_bytes=path.stat().st_size,
            stamp=_stamp(path.read_bytes()),
        )
        for name, path in files.items()
    )


def read_novels_slice(piece: Slice) -> Iterator[Document]:
    """The chapters of one novel. Raises SourceUnreadableError for another novel or version."""
    files = _files()
    if piece.path not in files:
        raise SourceUnreadableError(
            f"novels: no novel {piece.path!r}; the novels are {', '.join(files)}: "
            "list the source again"
        )
    stored = files[piece.path].read_bytes()
    require_stamp(piece, _stamp(stored))
    for line in bz2.decompress(stored).splitlines():
        record = json.loads(line)
        yield Document(record["text"], f"{record['title']}, chapter {record['chapter']}")


def _files() -> dict[str, Path]:
    return {path.name.removesuffix(_SUFFIX): path for path in sorted(_FOLDER.glob(f"*{_SUFFIX}"))}


def _stamp(stored: bytes) -> str:
    return hashlib.sha256(stored).hexdigest()
