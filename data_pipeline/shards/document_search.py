"""Documents of data sets found by number, or by their ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.traversal import on_threads

_Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, kw_only=True)
class StoredDocument:
    """Place of a document in a split: its tokens are `start` to `stop` (exclusive) of a shard."""

    data_set: int
    """Number of the data set among those of a run, from 0, as all fields."""
    number: int
    shard: int
    start: int
    stop: int


def document_by_number(
    data_set: DataSet, split: str, number: int, of_run: int = 0
) -> StoredDocument:
    """The document with this number, as in `megaback shards inspect`; reads one shard's index.

    Raises ConfigError for a number past the split's end.
    """
    before = 0
    for shard, entry in enumerate(data_set.manifest.split(split)):
        if number < before + entry.documents:
            with data_set.open_shard(entry) as reader:
                tokens = reader.document_tokens()[: number - before + 1]
            stop = int(tokens.sum())
            return StoredDocument(
                data_set=of_run, number=number, shard=shard, start=stop - int(tokens[-1]), stop=stop
            )
        before += entry.documents
    raise ConfigError(
        f"there is no document {number} (from 0): the {split} set of {data_set.name} has "
        f"{before:,} documents"
    )


def documents_with_ids(
    data_sets: Sequence[DataSet], split: str, ids: _Ids, workers: int | None = None
) -> list[StoredDocument]:
    """Every document with exactly these ids, with markers; reads frames only if lengths match."""
    shards = []
    for of_run, data_set in enumerate(data_sets):
        before = 0
        for shard, entry in enumerate(data_set.manifest.split(split)):
            if entry.tokens >= len(ids):
                shards.append((of_run, shard, before, entry))
            before += entry.documents

    def search(place: tuple[int, int, int, ShardEntry]) -> list[StoredDocument]:
        of_run, shard, before, entry = place
        return [
            StoredDocument(
                data_set=of_run,
                number=before + number,
                shard=shard,
                start=start,
                stop=start + len(ids),
            )
            for number, start in _search_shard(data_sets[of_run], entry, ids)
        ]

    found = [
        document
        for _, of_shard in on_threads(search, shards, workers, f"{split} shards")
        for document in of_shard
    ]
    return sorted(found, key=lambda document: (document.data_set, document.number))


def _search_shard(data_set: DataSet, entry: ShardEntry, ids: _Ids) -> list[tuple[int, int]]:
    """Number within the shard and first token of each document with these ids."""
    with data_set.open_shard(entry) as reader:
        tokens = reader.document_tokens()
        stops = np.cumsum(tokens)
        frame = lru_cache(maxsize=1)(reader.frame)  # neighbors are often in one frame
        starts = [
            (number, int(stops[number]) - len(ids))
            for number in np.flatnonzero(tokens == len(ids)).tolist()
        ]
        frame_tokens = data_set.manifest.frame_tokens
        return [place for place in starts if _holds(frame, frame_tokens, place[1], ids)]


def _holds(frame: Callable[[int], _Ids], frame_tokens: int, start: int, ids: _Ids) -> bool:
    """Whether these ids are at token `start`; stops at the first difference."""
    compared = 0
    while compared < len(ids):
        number, first = divmod(start + compared, frame_tokens)
        part = frame(number)[first : first + len(ids) - compared]
        if not np.array_equal(part, ids[compared : compared + len(part)]):
            return False
        compared += len(part)
    return True
