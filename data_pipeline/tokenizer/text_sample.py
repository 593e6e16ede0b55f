"""A deterministic sample of texts from all parts of the sources that fits in memory."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_pipeline.sources.documents import (
    Columns,
    OnBadRecord,
    Slice,
    stop_at_bad_record,
    stop_or_skip,
)
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.sources.skipped import Skipped, merged
from data_pipeline.sources.weighted import WeightedSource

_SMALLEST_PART_BYTES = 256 << 10  # opening a part costs about as much as reading this


def sample_texts(
    sources: Sequence[WeightedSource],
    max_bytes: int,
    columns: Columns,
    on_bad_record: OnBadRecord = stop_at_bad_record,
    on_skipped_files: Callable[[Skipped], None] = lambda _skipped: None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Iterator[str]:
    """Texts of up to `max_bytes` of UTF-8, from slices that are spread evenly over the sources.

    The share of a slice is by its size and weight, and is read from its beginning; the last text of
    a share may be cut. Raises the errors of the sources.
    """
    skips_bad = on_bad_record not in (stop_at_bad_record, stop_or_skip)
    how: dict[str, Any] = {"skips_bad": skips_bad, "max_record_bytes": max_record_bytes}
    listings = [(list_source(part.source, columns, **how), part.weight) for part in sources]
    on_skipped_files(merged(listing.skipped for listing, _ in listings))
    listed = [(piece, weight) for listing, weight in listings for piece in listing.slices]
    is_known = any(piece.size_bytes for piece, _ in listed)
    weighted = [(piece, weight * (piece.size_bytes if is_known else 1)) for piece, weight in listed]
    chosen = _spread(weighted, max(1, max_bytes // _SMALLEST_PART_BYTES))
    total = sum(weight for _, weight in chosen)
    taken_bytes = 0.0
    due_bytes = 0.0
    for piece, weight in chosen:
        due_bytes += max_bytes * weight / total
        for document in read_slice(piece, columns, on_bad_record, max_record_bytes):
            left_bytes = round(due_bytes - taken_bytes)
            if left_bytes <= 0:
                break
            text = _cut(document.text, left_bytes)
            taken_bytes += num_bytes(text)
            yield text


def num_bytes(text: str) -> int:
    """Bytes of a text in UTF-8, lone surrogates included."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _spread(weighted: Sequence[tuple[Slice, float]], number: int) -> Sequence[tuple[Slice, float]]:
    if number >= len(weighted):
        return weighted
    return [weighted[(2 * index + 1) * len(weighted) // (2 * number)] for index in range(number)]


def _cut(text: str, max_bytes: int) -> str:
    if num_bytes(text) <= max_bytes:
        return text
    return text.encode("utf-8", "surrogatepass")[:max_bytes].decode("utf-8", "ignore")
