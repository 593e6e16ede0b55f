"""Reading and truncating wandb's own logs of a run: `wandb/offline-run-…/run-ID.wandb`.

The format is LevelDB's log (github.com/google/leveldb, doc/log_format.md) after a header of seven
bytes: blocks of 32 KiB that contain pieces of records with a CRC-32. A record is wandb's protobuf
`Record`, and its `history` is a step. A killed process leaves a log without its last block, and
readers stop there: so a log may also be truncated between two records.
"""

import glob
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaback.run_folder import WANDB_FOLDER

_FILE_HEADER = struct.Struct("<4sHB")
_FILE_KIND = (b":W&B", 0xBEE1, 0)
_PIECE_HEADER = struct.Struct("<IHB")
_BLOCK_BYTES = 32 * 1024
_WHOLE, _FIRST, _LAST = 1, 2, 4
_OFFLINE_PREFIX = "offline-run-"


@dataclass(frozen=True)
class Segment:
    """Log of one start of a run."""

    path: Path
    steps: tuple[int, ...]
    """Steps in the order of the log."""
    offsets: tuple[int, ...]
    """Position of each record's beginning."""

    @property
    def is_sent(self) -> bool:
        """Whether a server may have it: it was online, or `wandb sync` has sent it."""
        is_offline = self.path.parent.name.startswith(_OFFLINE_PREFIX)
        return not is_offline or self.path.with_name(self.path.name + ".synced").exists()


def read_segments(run: Path, run_id: str) -> list[Segment]:
    """The logs of one run of wandb in a folder, oldest first; links are not followed.

    Raises ValueError for files of another kind.
    """
    id_of_run = glob.escape(run_id)
    paths = (run / WANDB_FOLDER).glob(f"*run-*-{id_of_run}/run-{id_of_run}.wandb")
    own = [path for path in paths if not path.is_symlink() and not path.parent.is_symlink()]
    return [_read_segment(path) for path in sorted(own, key=_started)]


def cut_back(segment: Segment, last_step: int) -> Segment:
    """Truncate a log after `last_step`. Raises OSError."""
    later = [index for index, step in enumerate(segment.steps) if step > last_step]
    if not later:
        return segment
    os.truncate(segment.path, segment.offsets[later[0]])
    return Segment(segment.path, segment.steps[: later[0]], segment.offsets[: later[0]])


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a log with their offsets, up to the first incomplete one.

    Raises ValueError for a file of another kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    start, content = 0, b""
    for offset, kind, piece in _pieces(path):
        if kind in (_WHOLE, _FIRST):
            start, content = offset, b""
        content += piece
        if kind in (_WHOLE, _LAST):
            yield start, Record.FromString(content)


def _read_segment(path: Path) -> Segment:
    found = [
        (record.history.step.num, offset)
        for offset, record in read_records(path)
        if record.WhichOneof("record_type") == "history"
    ]
    return Segment(path, tuple(step for step, _ in found), tuple(offset for _, offset in found))


def _pieces(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Offsets, kinds and contents of pieces, up to the first incomplete one."""
    with path.open("rb") as file:
        block = file.read(_BLOCK_BYTES)
        if len(block) < _FILE_HEADER.size:
            return  # killed before the first write
        if _FILE_HEADER.unpack_from(block) != _FILE_KIND:
            raise ValueError(
                f"{path} is not a log of a version of wandb that megaback supports; "
                "move the folder wandb out of the run"
            )
        block_start, position = 0, _FILE_HEADER.size
        while block:
            while position + _PIECE_HEADER.size <= len(block):
                checksum, num_bytes, kind = _PIECE_HEADER.unpack_from(block, position)
                begin = position + _PIECE_HEADER.size
                piece = block[begin : begin + num_bytes]
                if len(piece) < num_bytes or zlib.crc32(bytes([kind]) + piece) != checksum:
                    return
                yield block_start + position, kind, piece
                position = begin + num_bytes
            block_start, position = block_start + len(block), 0
            block = file.read(_BLOCK_BYTES)


def _started(path: Path) -> tuple[str, str]:
    """Sort key of `offline-run-20260102_030405-ID` and `run-…` by their times."""
    return path.parent.name.removeprefix("offline-"), str(path)
