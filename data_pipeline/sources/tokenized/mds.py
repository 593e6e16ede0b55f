"""Documents of mosaicml-streaming's MDS: a sample each, or cut from rows of joined ones."""

import hashlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources.documents import Document, Slice, require_stamp
from data_pipeline.sources.tokenized.documents import (
    AnyIds,
    RawDocument,
    RawItem,
    TokenizedFormat,
    cut,
    too_long,
)
from data_pipeline.sources.tokenized.mds_shards import MdsShard, read_mds_index


def list_mds(folder: Path, form: TokenizedFormat) -> list[Slice]:
    """A slice per shard. Raises OSError, SourceUnreadableError."""
    shards = read_mds_index(folder, form.column)
    return [
        Slice(
            kind="mds",
            path=str(folder),
            start=number,
            stop=number + 1,
            size_bytes=shard.raw_bytes,
            stamp=_stamp(shards, number),
        )
        for number, shard in enumerate(shards)
    ]


def read_mds(piece: Slice, form: TokenizedFormat, max_record_bytes: int) -> Iterator[RawItem]:
    """The documents of a shard, or those that begin in it. Raises OSError,
    SourceUnreadableError."""
    shards = read_mds_index(Path(piece.path), form.column)
    if piece.start >= len(shards):
        raise SourceUnreadableError(f"{piece.path}: changed since it was listed; list it again")
    require_stamp(piece, _stamp(shards, piece.start))
    shard = shards[piece.start]
    if shard.encoding == "str":
        return _texts(shard)
    if form.joined:
        return _joined(shards, piece.start, form, max_record_bytes)
    return _samples(shard, form, max_record_bytes)


def _texts(shard: MdsShard) -> Iterator[RawItem]:
    for sample, value in enumerate(shard.values()):
        place = f"{shard.path}: sample {sample:,}"
        try:
            yield Document(value.decode(), place)
        except UnicodeDecodeError:
            yield BadRecordError(f"{place}: its text is not UTF-8; fix or remove it", "not UTF-8")


def _samples(shard: MdsShard, form: TokenizedFormat, max_record_bytes: int) -> Iterator[RawItem]:
    _require_documents(shard, form)
    for sample, ids in enumerate(shard.ids(form)):
        place = f"{shard.path}: sample {sample:,}"
        if len(ids) > max_record_bytes:
            yield too_long(place, max_record_bytes, form)
        else:
            yield RawDocument(ids, place)


def _require_documents(shard: MdsShard, form: TokenizedFormat) -> None:
    """Raises SourceUnreadableError for rows of one length: parts of joined documents."""
    lengths = set()
    for ids in shard.ids(form):
        lengths.add(len(ids))
        if len(lengths) > 1 or (len(ids) and ids[-1] == form.end_id):
            return
    if shard.samples > 1:
        raise SourceUnreadableError(
            f"{shard.path}: its {shard.samples:,} samples have {max(lengths):,} ids each, and none "
            f"ends with id {form.end_id}: they are rows, whose documents cannot be distinguished; "
            "set `joined` and the `end_id` between documents"
        )


def _joined(
    shards: list[MdsShard], number: int, form: TokenizedFormat, max_record_bytes: int
) -> Iterator[RawItem]:
    shard = shards[number]
    own_tokens = float("inf")
    has_end = False

    def chunks() -> Iterator[AnyIds]:
        nonlocal own_tokens, has_end
        position = 0
        for each in shards[number:]:
            if each.group != shard.group:
                return  # of another process: documents do not continue there
            for ids in each.ids(form):
                has_end = has_end or bool((ids == form.end_id).any())
                position += len(ids)
                yield ids
            if each is shard:
                own_tokens = position

    is_first = number == 0 or shards[number - 1].group != shard.group
    begins_within = False
    if not is_first:
        (last,) = deque(shards[number - 1].ids(form), maxlen=1) or (np.empty(0, np.int64),)
        begins_within = not len(last) or last[-1] != form.end_id
    documents = cut(
        chunks(), form.end_id, lambda: own_tokens, max_record_bytes, skips_first=begins_within
    )
    for start, ids in documents:
        place = f"{shard.path}: document at token {start:,}"
        if is_first and not has_end and shard.samples > 1:
            raise SourceUnreadableError(
                f"{shard.path}: id {form.end_id} is in none of its samples, so that their "
                "documents cannot be distinguished; set `end_id` to the id between documents"
            )
        yield too_long(place, max_record_bytes, form) if ids is None else RawDocument(ids, place)


def _stamp(shards: list[MdsShard], number: int) -> str:
    """Stamp of a shard and of the next ones, in which its last document may continue."""
    described = [repr(shards[number])]
    described += [each.stamp() for each in shards[number : number + 2]]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()
