"""Documents from Hugging Face data sets.

Parquet, JSON and text files are read directly, parquet in slices of row groups. Other data sets are
streamed by the `datasets` library, one slice per shard. A local folder with the layout of a data
set on the hub is read in the same way.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.common.packages import require_package
from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import (
    BadRecordError,
    MegabackError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources.data_set_card import read_card, require_own_files, require_within
from data_pipeline.sources.documents import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    documents_of,
    require_columns,
    require_short,
    require_stamp,
)
from data_pipeline.sources.file_reader import holds_records, list_files
from data_pipeline.sources.files import kind_of, name_of
from data_pipeline.sources.memory_fence import MemoryFence, count_arrow_memory
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES
from data_pipeline.storage.retries import reason_of, require_hub, with_retries
from data_pipeline.storage.stamps import file_stamp

Result = TypeVar("Result")

_SPLIT = "train"
# Settings of a loader that do not change the records; others must have their defaults.
_NEUTRAL_SETTINGS = {
    *("batch_size", "block_size", "chunksize", "fragment_scan_options", "use_threads"),
    *("on_mixed_types", "parse_agent_traces"),
}

# Loaders of records; the library's other loaders read images, audio and the like.
_LOADERS = ("parquet", "json", "csv", "text", "arrow", "xml")
_MAX_AT_ONCE = {
    "parquet": ("batch_size", 256),
    "json": ("chunksize", 10 << 20),
    "csv": ("chunksize", 1000),
    "text": ("chunksize", 10 << 20),
}
"""Maximum chunk of each loader, in rows or bytes, whatever a data set's README sets."""
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def list_hub_slices(
    source: str,
    columns: AnyColumns,
    *,
    skips_bad: bool | None = None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> list[Slice]:
    """Slices of the train split of `NAME[:CONFIG]`.

    Raises SourceMissingError when the hub, the data set, the config or the split is not found, and
    SourceUnreadableError when the data set lacks a column or the network fails.
    """
    name, _, config = source.partition(":")
    if not name:
        raise SourceMissingError(
            "hf: the name of the data set is missing; write `hf:NAME` or `hf:NAME:CONFIG`"
        )
    if Path(name).is_dir():
        name = str(Path(name).absolute())
    path = f"{name}:{config}" if config else name
    builder = _builder(path)
    addresses, kind = _plain_files(builder, max_record_bytes)
    if addresses:
        return list_files(addresses, columns, skips_bad=skips_bad, kind=kind)
    fence = MemoryFence(f"hf:{path}", max_record_bytes)
    stamp, stream = _open(path, builder, fence)
    # Without declared features, the first record has the columns.
    names = stream.column_names or next(_records(stream, f"hf:{path}", fence), None)
    if names is not None:
        require_columns(columns, names, f"hf:{path}")
    splits = stream.info.splits or {}
    size_bytes = splits[_SPLIT].num_bytes // stream.num_shards if _SPLIT in splits else 0
    return [
        Slice(
            kind="hub", path=path, start=shard, stop=shard + 1, size_bytes=size_bytes, stamp=stamp
        )
        for shard in range(stream.num_shards)
    ]


def read_hub_slice(
    piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord, max_record_bytes: int
) -> Iterator[Document]:
    """Documents of one shard. Raises SourceMissingError, SourceUnreadableError, BadRecordError."""
    builder = _builder(piece.path)
    fence = MemoryFence(f"hf:{piece.path}", max_record_bytes)
    stamp, stream = _open(piece.path, builder, fence)
    require_stamp(piece, stamp)
    shard = stream.shard(num_shards=stream.num_shards, index=piece.start)
    where = f"hf:{piece.path} shard {piece.start}"
    for row, record in enumerate(_records(shard, where, fence)):
        position = f"{where} row {row}"
        try:
            documents = documents_of(record, columns, position, position)
            require_short(documents, position, max_record_bytes)
        except BadRecordError as error:
            on_bad_record(error)
        else:
            yield from documents


def _records(
    stream: Iterable[dict[str, object]], where: str, fence: MemoryFence
) -> Iterator[dict[str, object]]:
    """Records of a stream. Raises SourceUnreadableError for errors of libraries."""
    records = iter(stream)
    while True:
        try:
            with fence.up():
                record = next(records)
        except StopIteration:
            return
        except MegabackError:
            raise
        except Exception as error:  # noqa: BLE001 - errors of network and format libraries
            if "out of memory" in str(error):  # raised by pandas
                raise fence.error() from None
            raise SourceUnreadableError(
                f"{where}: {reason_of(error)}; check the network and run the command again"
            ) from None
        yield record


def _builder(path: str) -> Any:
    """DatasetBuilder of a data set. Raises SourceMissingError, SourceUnreadableError."""
    require_package("datasets", f"hf:{path}")
    import datasets

    # The library would import torch to detect worker processes, which do not exist here.
    datasets.config.TORCH_AVAILABLE = False
    name, _, config = path.partition(":")

    def load() -> Any:
        root, revision = _checked(name)
        builder = datasets.load_dataset_builder(name, config or None, revision=revision)
        _require_loader(builder, path)
        for addresses in (builder.config.data_files or {}).values():
            require_within(addresses, root, f"hf:{path}")
        if _SPLIT not in (builder.config.data_files or {}):
            raise SourceMissingError(
                f"hf:{path}: it has no split {_SPLIT!r}; the splits are "
                f"{shown_names(builder.config.data_files or ['unknown'])}: name a config or "
                "data set that has it"
            )
        return builder

    return _reached(path, load, is_offline=datasets.config.HF_HUB_OFFLINE)


def _checked(name: str) -> tuple[str, str | None]:
    """Folder or address, and commit, of a data set, after checks of the files that it names.

    Raises SourceMissingError, SourceUnreadableError, and what the hub's library raises.
    """
    from datasets import packaged_modules
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    shown = f"hf:{name}"
    if Path(name).is_dir():
        require_own_files(shown, partial(read_card, Path(name)))
        return name, None
    if _NAME.fullmatch(name) is None or name in packaged_modules._PACKAGED_DATASETS_MODULES:
        raise SourceMissingError(
            f"{shown}: neither the name of a data set on the hub nor a folder; write `hf:NAME`, or "
            "name files"
        )
    try:
        commit = HfApi().dataset_info(name).sha
    except RepositoryNotFoundError:
        raise SourceMissingError(
            f"{shown}: no such data set on the hub, or no permission to read it; "
            "check the name, and log in with `hf auth login` if it is gated or private"
        ) from None

    def read(file_name: str, num_bytes: int) -> bytes | None:
        where: Any = {"repo_id": name, "filename": file_name, "repo_type": "dataset"}
        where["revision"] = commit
        try:
            if (get_hf_file_metadata(hf_hub_url(**where)).size or 0) >= num_bytes:
                return bytes(num_bytes)
            return Path(hf_hub_download(**where)).read_bytes()
        except EntryNotFoundError:
            return None

    require_own_files(shown, read)
    return f"hf://datasets/{name}@{commit}", commit


def _require_loader(builder: Any, path: str) -> None:
    """Bound the chunks of a loader. Raises SourceUnreadableError unless it reads records."""
    loader = type(builder).__module__.rpartition(".")[2]
    if loader not in _LOADERS:
        raise SourceUnreadableError(
            f"hf:{path}: the loader {loader!r} of the library `datasets` is not supported; "
            f"name a data set of {', '.join(_LOADERS)} files"
        )
    if loader in _MAX_AT_ONCE:
        name, maximum = _MAX_AT_ONCE[loader]
        asked = getattr(builder.config, name)
        is_less = isinstance(asked, int) and 0 < asked < maximum
        setattr(builder.config, name, asked if is_less else maximum)


def _open(path: str, builder: Any, fence: MemoryFence) -> tuple[str, Any]:
    """Stamp and stream of the train split. Raises SourceMissingError, SourceUnreadableError."""
    import datasets

    count_arrow_memory()

    def start() -> tuple[str, Any]:
        with fence.up():
            # Without decoding, which opens any path or URL in an image column.
            stream = builder.as_streaming_dataset(split=_SPLIT)
            stream = stream.decode(False) if stream.features else stream
        return _stamp(builder.config.data_files[_SPLIT]), stream

    return _reached(path, start, is_offline=datasets.config.HF_HUB_OFFLINE)


def _reached(path: str, attempt: Callable[[], Result], *, is_offline: bool) -> Result:
    """Call `attempt`, with retries unless the hub is in offline mode."""

    is_local = Path(path.partition(":")[0]).is_dir()

    def ask() -> Result:
        if not is_local:
            require_hub()
        return attempt()

    try:
        return attempt() if is_offline else with_retries(f"hf:{path}", ask)
    except MegabackError:
        raise
    except Exception as error:  # noqa: BLE001 - errors of network and format libraries
        raise SourceMissingError(
            f"hf:{path}: {reason_of(error)}; "
            "check the name as in `hf:NAME` or `hf:NAME:CONFIG`, and that the hub can be reached"
        ) from None


def _plain_files(builder: Any, max_record_bytes: int) -> tuple[list[str], str]:
    """Addresses of the data files if they can be read directly, else none; and their kind.

    That holds for the library's loaders of parquet, JSON and text without settings that select or
    change records.
    """
    from datasets import BuilderConfig
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    kinds = {Parquet: "parquet", Json: "jsonl", Text: "text"}
    wanted = next((kinds[loader] for loader in kinds if isinstance(builder, loader)), "")
    common = {field.name for field in dataclasses.fields(BuilderConfig)} | _NEUTRAL_SETTINGS
    for field in dataclasses.fields(builder.config):
        if field.name not in common and getattr(builder.config, field.name) != field.default:
            return [], ""
    addresses = [str(address) for address in builder.config.data_files[_SPLIT]]
    if {kind_of(address) for address in addresses} != {wanted}:
        return [], ""
    # A .json file may contain any JSON; all files of a data set have the same form.
    unsure = [address for address in addresses if ".json" in name_of(address).suffixes]
    if unsure and not holds_records(unsure[0], max_record_bytes):
        return [], ""
    return addresses, "lines" if wanted == "text" else wanted


def _stamp(data_files: list[str]) -> str:
    """Digest of the data files: of addresses with a revision, or of local contents."""
    stamps = [file_stamp(Path(name)) if Path(name).is_file() else name for name in data_files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()
