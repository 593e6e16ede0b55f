"""The files of a plan as JSON: each once, with its slices."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from data_pipeline.common.checked_json import briefly, checked, require_within
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.sources.documents import Slice
from data_pipeline.sources.files import FILE_KINDS
from data_pipeline.sources.tokenized.registry import TOKENIZED_KINDS
from data_pipeline.storage.address_variables import kept

_KINDS = FILE_KINDS | TOKENIZED_KINDS | {"hub", "novels", "pydocs"}


def files_of(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """Slices as JSON, grouped by file: the slices of a file are consecutive."""
    files = []
    for (kind, path, stamp), group in groupby(slices, lambda s: (s.kind, s.path, s.stamp)):
        pieces = list(group)
        files.append(
            {
                "kind": kind,
                "path": path,
                "stamp": stamp,
                "slices": [[piece.start, piece.stop, piece.size_bytes] for piece in pieces],
            }
        )
    return files


def slices_of(files: object) -> tuple[Slice, ...]:
    """Slices from the JSON of `files_of`. Raises KeyError, TypeError or ValueError."""
    slices = []
    for file in checked("inputs", files, list):
        kind, path, stamp = (checked(key, file[key], str) for key in ("kind", "path", "stamp"))
        _require_readable(kind, path)
        kept_path = kept(path)
        for piece in checked("slices", file["slices"], list):
            start, stop, size_bytes = checked("slices", piece, tuple[int, int, int])
            for number in (start, stop, size_bytes):
                require_within("slices", number, 0, INT64_MAX)
            slices.append(
                Slice(
                    kind=kind,
                    path=kept_path,
                    start=start,
                    stop=stop,
                    size_bytes=size_bytes,
                    stamp=stamp,
                )
            )
    return tuple(slices)


def _require_readable(kind: str, path: str) -> None:
    """Raises ValueError for an unknown kind, and for a path that no system call accepts."""
    if kind not in _KINDS:
        raise ValueError(f"kind is {briefly(kind)}")
    try:
        is_path = "\0" not in path and bool(os.fsencode(path))
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise ValueError(f"path is {briefly(path)}")
