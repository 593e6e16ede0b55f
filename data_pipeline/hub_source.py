"""Documents from a Hugging Face data set.

Where its files are parquet or lines of JSON, they are read as files, cut by row groups and resumed
there. Any other data set is streamed by the `datasets` library: one slice for each of its shards.
A local folder laid out like a data set on the hub is read in the same way.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import (
    BadRecordError,
    MegabackError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.file_source import holds_lines, list_files
from data_pipeline.files import kind_of, name_of
from data_pipeline.retries import reason_of, require_hub, with_retries
from data_pipeline.slices import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    documents_of,
    file_stamp,
    require_columns,
    require_stamp,
)

Result = TypeVar("Result")

_SPLIT = "train"
# Fields of a loader's settings that do not change what is read; any other must have its default.
_NEUTRAL_SETTINGS = {
    *("batch_size", "block_size", "chunksize", "fragment_scan_options", "use_threads"),
    *("on_mixed_types", "parse_agent_traces"),
}


def list_hub_slices(
    source: str, columns: AnyColumns, *, skips_bad: bool | None = None
) -> list[Slice]:
    """Slices of the train split of `NAME[:CONFIG]`.

    Raises SourceMissingError when the hub, the data set, the config or the split is not there, and
    SourceUnreadableError when the data set lacks a column or the network does not last.
    """
    name, _, config = source.partition(":")
    if not name:
        raise SourceMissingError("hf: names no data set; write `hf:NAME` or `hf:NAME:CONFIG`")
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    path = f"{name}:{config}" if config else name
    builder = _builder(path)
    addresses = _plain_files(builder)
    if addresses:
        return list_files(addresses, columns, skips_bad=skips_bad)
    stamp, stream = _open(path, builder)
    # Without a header to tell, the first record does.
    names = stream.column_names or next(_records(stream, f"hf:{path}"), None)
    if names is not None:
        require_columns(columns, names, f"hf:{path}")
    splits = stream.info.splits or {}
    size_bytes = splits[_SPLIT].num_bytes // stream.num_shards if _SPLIT in splits else 0
    return [
        Slice("hub", path, shard, shard + 1, size_bytes, stamp)
        for shard in range(stream.num_shards)
    ]


def read_hub_slice(
    piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord
) -> Iterator[Document]:
    """Documents of one shard. Raises SourceMissingError, SourceUnreadableError, BadRecordError."""
    stamp, stream = _open(piece.path, _builder(piece.path))
    require_stamp(piece, stamp)
    shard = stream.shard(num_shards=stream.num_shards, index=piece.start)
    where = f"hf:{piece.path} shard {piece.start}"
    for row, record in enumerate(_records(shard, where)):
        position = f"{where} row {row}"
        try:
            documents = documents_of(record, columns, position, position)
        except BadRecordError as error:
            on_bad_record(error)
        else:
            yield from documents


def _records(stream: Iterable[dict[str, object]], where: str) -> Iterator[dict[str, object]]:
    """The records of a stream, whose errors become one sentence."""
    records = iter(stream)
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - whatever the network and format libraries raise
            raise SourceUnreadableError(
                f"{where}: {reason_of(error)}; check the network and run the command again"
            ) from None
        yield record


def _builder(path: str) -> Any:
    """What `datasets` knows about a data set. Raises SourceMissingError, SourceUnreadableError."""
    import datasets

    # The library would load torch to look for worker processes; there are none here.
    datasets.config.TORCH_AVAILABLE = False
    name, _, config = path.partition(":")

    def load() -> Any:
        builder = datasets.load_dataset_builder(name, config or None)
        if _SPLIT not in (builder.config.data_files or {}):
            raise SourceMissingError(
                f"hf:{path}: it has no split {_SPLIT!r}; "
                f"the splits are {', '.join(builder.config.data_files or {}) or 'unknown'}"
            )
        return builder

    return _reached(path, load, is_offline=datasets.config.HF_HUB_OFFLINE)


def _open(path: str, builder: Any) -> tuple[str, Any]:
    """Stamp and stream of the train split. Raises SourceMissingError, SourceUnreadableError."""
    import datasets

    def start() -> tuple[str, Any]:
        stream = builder.as_streaming_dataset(split=_SPLIT)
        return _stamp(builder.config.data_files[_SPLIT]), stream

    return _reached(path, start, is_offline=datasets.config.HF_HUB_OFFLINE)


def _reached(path: str, attempt: Callable[[], Result], *, is_offline: bool) -> Result:
    """The result of an attempt, with retries unless the user has switched the network off."""

    is_local = Path(path.partition(":")[0]).is_dir()

    def ask() -> Result:
        if not is_local:
            require_hub()
        return attempt()

    try:
        return attempt() if is_offline else with_retries(f"hf:{path}", ask)
    except MegabackError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the network and format libraries raise
        raise SourceMissingError(
            f"hf:{path}: {reason_of(error)}; "
            "check the name as in `hf:NAME` or `hf:NAME:CONFIG`, and that the hub can be reached"
        ) from None


def _plain_files(builder: Any) -> list[str]:
    """The addresses of the data files if reading them gives the data set's records, else none.

    That is so for the library's own loaders of parquet and JSON with nothing set that selects or
    changes records. Its loader of texts makes a record of each line: such a data set is streamed.
    """
    from datasets import BuilderConfig
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    kind = {Parquet: "parquet", Json: "jsonl"}
    wanted = {kind[loader] for loader in kind if isinstance(builder, loader)}
    common = {field.name for field in dataclasses.fields(BuilderConfig)} | _NEUTRAL_SETTINGS
    for field in dataclasses.fields(builder.config):
        if field.name not in common and getattr(builder.config, field.name) != field.default:
            return []
    addresses = [str(address) for address in builder.config.data_files[_SPLIT]]
    if {kind_of(address) for address in addresses} != wanted:
        return []
    # A file of suffix .json holds either lines or one list; a data set has one sort of them.
    unsure = [address for address in addresses if ".json" in name_of(address).suffixes]
    return [] if unsure and not holds_lines(unsure[0]) else addresses


def _stamp(data_files: list[str]) -> str:
    """Digest of the data files: hub addresses name a revision, local files are looked at."""
    stamps = [file_stamp(Path(name)) if Path(name).is_file() else name for name in data_files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()
