"""Documents from a Hugging Face data set, streamed: one slice for each of its shards.

A local folder laid out like a data set on the hub is read in the same way.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import MegabackError, SourceMissingError, SourceUnreadableError
from data_pipeline.slices import Document, Slice, file_stamp, record_text, require_stamp

_SPLIT = "train"


def list_hub_slices(source: str, text_column: str) -> tuple[Slice, ...]:
    """Slices of the train split of `NAME[:CONFIG]`.

    Raises SourceMissingError when the hub, the data set, the config or the split is not there, and
    SourceUnreadableError when the data set has no such column.
    """
    name, _, config = source.partition(":")
    if not name:
        raise SourceMissingError("hf: names no data set; write `hf:NAME` or `hf:NAME:CONFIG`")
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    path = f"{name}:{config}" if config else name
    stamp, stream = _open(path)
    columns = stream.column_names
    if columns is not None and text_column not in columns:
        raise SourceUnreadableError(
            f"hf:{path}: no column {text_column!r}; the columns are {', '.join(columns)}: "
            "name the one with the text with --text-column"
        )
    splits = stream.info.splits or {}
    size_bytes = splits[_SPLIT].num_bytes // stream.num_shards if _SPLIT in splits else 0
    return tuple(
        Slice("hub", path, shard, shard + 1, size_bytes, stamp)
        for shard in range(stream.num_shards)
    )


def read_hub_slice(piece: Slice, text_column: str) -> Iterator[Document]:
    """Documents of one shard. Raises SourceMissingError, SourceUnreadableError, BadRecordError."""
    stamp, stream = _open(piece.path)
    require_stamp(piece, stamp)
    shard = stream.shard(num_shards=stream.num_shards, index=piece.start)
    try:
        for row, record in enumerate(shard):
            position = f"hf:{piece.path} shard {piece.start} row {row}"
            yield Document(record_text(record, text_column, position), position)
    except MegabackError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the network and format libraries raise
        raise SourceUnreadableError(
            f"hf:{piece.path} shard {piece.start}: {_first_line(error)}; "
            "check the network and run the command again"
        ) from None


def _open(path: str) -> tuple[str, Any]:
    """Stamp and stream of a data set's train split. Raises SourceMissingError."""
    import datasets

    # The library would load torch to look for worker processes; there are none here.
    datasets.config.TORCH_AVAILABLE = False
    name, _, config = path.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        stream = builder.as_streaming_dataset(split=_SPLIT)
        stamp = _stamp(builder.config.data_files[_SPLIT])
    except Exception as error:  # noqa: BLE001 - whatever the network and format libraries raise
        raise SourceMissingError(
            f"hf:{path}: {_first_line(error)}; "
            "check the name as in `hf:NAME` or `hf:NAME:CONFIG`, and that the hub can be reached"
        ) from None
    return stamp, stream


def _stamp(data_files: list[str]) -> str:
    """Digest of the data files: hub addresses name a revision, local files are looked at."""
    stamps = [file_stamp(Path(name)) if Path(name).is_file() else name for name in data_files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0].rstrip(".") or type(error).__name__
