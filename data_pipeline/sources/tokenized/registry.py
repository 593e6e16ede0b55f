"""Tokenized sources by the files that they consist of: flat ids, Megatron's, datatrove's or MDS.

They are local: their readers go back and forth in them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.common.local_paths import local_path
from data_pipeline.errors import SourceEmptyError, SourceUnreadableError
from data_pipeline.redaction import shown_url
from data_pipeline.sources.documents import Document, OnBadRecord, Slice
from data_pipeline.sources.file_reader import refused
from data_pipeline.sources.registry import Listing
from data_pipeline.sources.tokenized.datatrove import index_of, list_datatrove, read_datatrove
from data_pipeline.sources.tokenized.documents import (
    DocumentChecker,
    RawItem,
    TokenizedFormat,
)
from data_pipeline.sources.tokenized.mds import list_mds, read_mds
from data_pipeline.sources.tokenized.mds_shards import INDEX_NAME
from data_pipeline.sources.tokenized.megatron import list_megatron, read_megatron
from data_pipeline.sources.tokenized.streams import list_stream, read_stream, stream_files

_READERS: dict[str, Callable[[Slice, TokenizedFormat, int], Iterator[RawItem]]] = {
    "ids": read_stream,
    "megatron": read_megatron,
    "datatrove": read_datatrove,
    "mds": read_mds,
}
TOKENIZED_KINDS = frozenset(_READERS)


def list_tokenized(source: str, form: TokenizedFormat) -> Listing:
    """List the slices of a tokenized source.

    Raises SourceMissingError, SourceEmptyError, SourceUnreadableError.
    """
    path = local_path(source)
    if path is None:
        raise SourceUnreadableError(
            f"{shown_url(source)}: tokenized files are read from a disk; fetch them first, and "
            "give their folder"
        )
    try:
        slices = _list(path.absolute(), form)
    except OSError as error:
        raise refused(str(error.filename or source), error) from None
    if not any(piece.size_bytes for piece in slices):
        raise SourceEmptyError(f"{source}: the source is empty; name one with documents")
    return Listing(tuple(slices))


def read_tokenized(
    piece: Slice,
    form: TokenizedFormat,
    checker: DocumentChecker,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    """Documents of one slice, in order, with their ids.

    Raises the errors of `on_bad_record`, and SourceUnreadableError when the slice is damaged or has
    changed since listing.
    """
    try:
        yield from checker.documents(
            _READERS[piece.kind](piece, form, max_record_bytes), on_bad_record
        )
    except OSError as error:
        raise refused(str(error.filename or piece.path), error) from None


def train_and_val(source: str) -> tuple[str, str] | None:
    """The patterns of the train set and of the val set, if a folder holds both, by their names.

    So it is with nanoGPT's train.bin and val.bin, and with llm.c's fineweb_train_000001.bin.
    """
    path = local_path(source)
    if path is None or not path.is_dir():
        return None
    names = [each.name for each in path.iterdir() if each.suffix in (".bin", ".npy")]
    val = [name for name in names if "val" in name and "train" not in name]
    train = [name for name in names if "train" in name and "val" not in name]
    if not val or not train or len(val) + len(train) < len(names):
        return None
    if any((path / name).with_suffix(".idx").exists() for name in names):
        return None
    return str(path / "*train*"), str(path / "*val*")


def _list(path: Path, form: TokenizedFormat) -> list[Slice]:
    if path.name == INDEX_NAME and path.is_file():
        path = path.parent
    if (path / INDEX_NAME).is_file():
        return list_mds(path, form)
    with_index = path.with_name(f"{path.name}.idx")
    if not path.exists() and with_index.is_file():  # Megatron's prefix of both files
        return list_megatron(with_index)
    files = stream_files(path)
    indexes = [each.with_suffix(".idx") for each in files]
    if any(index.is_file() for index in indexes):
        return [piece for index in dict.fromkeys(indexes) for piece in list_megatron(index)]
    if any(index_of(each).is_file() for each in files):
        return [piece for each in files for piece in list_datatrove(each)]
    return list_stream(path, form)
