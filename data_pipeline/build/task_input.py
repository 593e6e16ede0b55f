"""Task input: reads portions of sources and filters their documents."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data_pipeline.build.plan import Task
from data_pipeline.build.progress import Counts
from data_pipeline.errors import BadRecordError
from data_pipeline.shards.manifest import SPLITS
from data_pipeline.sources.documents import Document, OnBadRecord, Slice, stop_or_skip
from data_pipeline.sources.registry import read_slice
from data_pipeline.sources.skipped import PARTS, RECORDS, Skipped, add_skipped, count_skipped
from data_pipeline.sources.tokenized.documents import AnyIds, DocumentChecker
from data_pipeline.sources.tokenized.registry import read_tokenized
from data_pipeline.text.codec import TextCodec

BAD_RECORD = "bad_record"
"""Key of malformed records in `excluded`."""
TOO_LONG = "too_long"
_EXCLUDED_EXAMPLES = {
    "empty": "example without an instruction or a response",
    "length": "example shorter than `min_characters` or longer than `max_characters`",
    TOO_LONG: "example longer than `context_tokens`",
}


def hash_fraction(eight_bytes: bytes) -> float:
    """Eight bytes of a hash as a number from 0 to 1."""
    return int.from_bytes(eight_bytes, "big") / 2.0**64


def belongs_to_val(sha256: bytes, val_fraction: float) -> bool:
    """Whether a text is in the val set: by its hash alone, so that equal texts share a split."""
    return hash_fraction(sha256[:8]) < val_fraction


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A document that passed the filters."""

    text: str
    response: str | None
    num_bytes: int
    sha256: bytes
    pass_number: int
    split: int | None
    """Index of its split; None: decided by the hash of its text."""
    position: str
    ids: AnyIds | None = None
    """Ids in the order of the text, of a tokenized source; None: the text is encoded."""


@dataclass
class Excluded:
    """Excluded documents, and skipped records and parts of records."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of documents and records, by the filter that excluded them."""
    skipped: Skipped = field(default_factory=dict)

    def add(self, other: "Excluded") -> None:
        self.counts.update(other.counts)
        add_skipped(self.skipped, other.skipped)


def excluded_by(name: str, position: str) -> Excluded:
    """A document excluded by a filter; for an example, with its position."""
    excluded = Excluded(Counter([name]))
    if position:
        count_skipped(excluded.skipped, PARTS, _EXCLUDED_EXAMPLES.get(name, name), position)
    return excluded


def read_task(task: Task, counts: Counts, codec: TextCodec) -> Iterator[Passed | Excluded]:
    """The documents of a task that pass the filters, and the excluded ones, in order."""
    settings = task.settings
    excluded = Excluded()  # between two documents may be a whole file of malformed records

    def skip(error: BadRecordError) -> None:
        excluded.counts[BAD_RECORD] += error.number
        count_skipped(excluded.skipped, RECORDS, error.cause, error.place, error.number)

    on_bad_record = skip if settings.on_bad_record == "skip" else stop_or_skip
    read = _reader(task, codec, on_bad_record)
    for portion in task.portions:
        split = None if portion.split is None else SPLITS.index(portion.split)
        size_bytes = portion.piece.size_bytes
        shown_bytes = 0
        for document in read(portion.piece):
            # An estimate, so that the time left is known before the end of a long file.
            step_bytes = min(len(document.content), size_bytes - shown_bytes)
            shown_bytes += step_bytes
            counts[3] += step_bytes
            for cause, place in document.excluded:
                count_skipped(excluded.skipped, PARTS, cause, place)
            if excluded.skipped:
                yield excluded
                excluded = Excluded()
            if reason := settings.exclusion_reason(document):
                is_example = document.response is not None
                yield excluded_by(reason, document.position if is_example else "")
                continue
            content = document.content
            sha256 = hashlib.sha256(content).digest()
            if portion.fraction < 1.0 and hash_fraction(sha256[8:16]) >= portion.fraction:
                yield Excluded(Counter(["weight"]))
                continue
            yield Passed(
                text=document.text,
                response=document.response,
                num_bytes=len(content),
                sha256=sha256,
                pass_number=portion.pass_number,
                split=split,
                position=document.position,
                ids=None if document.tokenized is None else document.tokenized.ids,
            )
        if excluded.skipped:
            yield excluded
            excluded = Excluded()
        counts[3] += size_bytes - shown_bytes


def _reader(
    task: Task, codec: TextCodec, on_bad_record: OnBadRecord
) -> Callable[[Slice], Iterator[Document]]:
    settings = task.settings
    form, max_record_bytes = settings.tokenized, settings.max_record_bytes
    if form is None:
        return lambda piece: read_slice(piece, settings.columns, on_bad_record, max_record_bytes)
    checker = DocumentChecker(form, codec, max_record_bytes)
    return lambda piece: read_tokenized(piece, form, checker, on_bad_record, max_record_bytes)
