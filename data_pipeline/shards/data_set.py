"""A data set in a folder or at a URL, opened by its manifest.

Shards over a network are fetched frame by frame and, with a cache, kept on a local disk. Damage is
reported when a shard is opened or a frame is read.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Protocol

from data_pipeline.common.file_names import path_within
from data_pipeline.common.limits import MAX_DICTIONARY_BYTES, MAX_TOKENIZER_BYTES
from data_pipeline.common.local_paths import local_path
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    ShardCorruptError,
    SourceUnreadableError,
    TokenizerError,
    TokenizerMismatchError,
)
from data_pipeline.shards.cache_folder import require_cache_folder
from data_pipeline.shards.frame_cache import CacheSettings, FrameCache
from data_pipeline.shards.manifest import (
    DICTIONARY_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
)
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.traversal import num_frames
from data_pipeline.storage.byte_ranges import ByteRanges, LocalRanges
from data_pipeline.storage.remote_folder import RemoteFolder
from data_pipeline.text.codec import TextCodec
from data_pipeline.text.tokenizer import TOKENIZER_JSON_NAME, TOKENIZER_NAME


class Folder(Protocol):
    """The files of a data set, by name."""

    shown: str
    """Address of the folder, for messages."""

    def read(self, name: str, max_bytes: int) -> bytes:
        """A whole file of at most `max_bytes`. Raises OSError, SourceUnreadableError."""

    def ranges(self, name: str, expected_bytes: int) -> ByteRanges:
        """A file to read in parts. Raises OSError, and ValueError for its name."""


class LocalFolder:
    """A folder on this machine or on a shared file system."""

    def __init__(self, path: Path) -> None:
        self.shown = str(path)
        self._path = path

    def read(self, name: str, max_bytes: int) -> bytes:
        return read_file(self._path / name, max_bytes)

    def ranges(self, name: str, expected_bytes: int) -> ByteRanges:  # noqa: ARG002
        return LocalRanges(path_within(self._path, name))


class DataSet:
    """A manifest and its shards. Threads may share it, and a process may fork with it."""

    def __init__(self, folder: Folder, manifest: Manifest, cache: FrameCache | None = None) -> None:
        self.manifest = manifest
        self.name = folder.shown
        """Path or URL without secrets, for messages."""
        self._folder = folder
        self._cache = cache
        self._dictionary: bytes | None = None

    @classmethod
    def open(cls, address: str | Path, cache: CacheSettings | None = None) -> "DataSet":
        """Read the manifest of a folder, or of the URL of one.

        `cache` is for frames read over a network. Raises ShardsMissingError without a manifest,
        ShardCorruptError for a damaged one, SourceUnreadableError when a server fails,
        SourceMissingError and BackendError for an address of an unsupported kind, and
        OutputExistsError and ConfigError for a cache folder that is not ours or that other users
        could change.
        """
        path = address if isinstance(address, Path) else local_path(address)
        folder: Folder
        frames = None
        if path is not None:
            folder = LocalFolder(path)
        else:
            remote = folder = RemoteFolder(str(address))
            if cache is not None:
                require_cache_folder(cache.folder)
                frames = FrameCache(cache, remote.origin)
        manifest = Manifest.read(folder.shown, partial(folder.read, MANIFEST_NAME))
        return cls(folder, manifest, frames)

    def codec(self) -> TextCodec:
        """The codec that the shards were encoded with.

        Raises TokenizerError, TokenizerMismatchError, ShardCorruptError, SourceUnreadableError.
        """
        shown = f"{self.name}/{TOKENIZER_NAME}"
        try:
            model_bytes = self._folder.read(TOKENIZER_NAME, MAX_TOKENIZER_BYTES)
        except (OSError, SourceUnreadableError) as error:
            # A server may forbid what is missing, as S3 does without permission to list.
            try:
                model_bytes = self._folder.read(TOKENIZER_JSON_NAME, MAX_TOKENIZER_BYTES)
            except (OSError, SourceUnreadableError) as other:
                first = other if isinstance(error, FileNotFoundError) else error
                if isinstance(first, SourceUnreadableError):
                    raise first from None
                raise TokenizerError(
                    f"cannot read the tokenizer {shown}: {first.strerror}; restore that file"
                ) from None
            shown = f"{self.name}/{TOKENIZER_JSON_NAME}"
        text_format = self.manifest.text_format
        try:
            codec = TextCodec(model_bytes, text_format.direction, text_format.unit)
        except TokenizerError as error:
            raise TokenizerError(f"{shown}: {error}") from None
        self.require_codec(codec)
        return codec

    def open_shard(self, entry: ShardEntry) -> ShardReader:
        """Open a shard, and check that it is the one in the manifest.

        Raises ShardCorruptError, SourceUnreadableError.
        """
        dictionary = self.require_dictionary()
        cache = None
        if self._cache is not None:
            cache = self._cache.of_shard(entry.file, entry.file_sha256, entry.file_bytes)
        try:
            file = self._folder.ranges(entry.file, entry.file_bytes)
        except OSError as error:
            raise ShardCorruptError(
                f"cannot read the shard {self.name}/{entry.file}: {error.strerror}; "
                "restore it or build the shards again"
            ) from None
        except ValueError as error:
            raise ShardCorruptError(f"{self.name}: {error}, or build the shards again") from None
        manifest = self.manifest
        reader = ShardReader(
            file, dictionary, cache, num_frames(manifest, entry), manifest.vocab_size
        )
        self._require_promised(reader, entry)
        return reader

    def require_dictionary(self) -> bytes | None:
        """The zstd dictionary of the shards, if any; read once, as there may be thousands of them.

        Raises ShardCorruptError, SourceUnreadableError.
        """
        expected_sha256 = self.manifest.dictionary_sha256
        if expected_sha256 is None:
            return None
        # No lock, which a fork could leave held: at worst, two threads read the same file.
        if self._dictionary is None:
            shown = f"{self.name}/{DICTIONARY_NAME}"
            try:
                dictionary = self._folder.read(DICTIONARY_NAME, MAX_DICTIONARY_BYTES)
            except OSError as error:
                raise ShardCorruptError(
                    f"cannot read the zstd dictionary {shown}, which its shards need: "
                    f"{error.strerror}; restore that file or build the shards again"
                ) from None
            sha256 = hashlib.sha256(dictionary).hexdigest()
            if sha256 != expected_sha256:
                raise ShardCorruptError(
                    f"{shown} has sha256 {sha256[:12]}, but the shards beside it were compressed "
                    f"with {expected_sha256[:12]}; restore that file or build the shards again"
                )
            self._dictionary = dictionary
        return self._dictionary

    def _require_promised(self, reader: ShardReader, entry: ShardEntry) -> None:
        """Raises ShardCorruptError unless the header of a shard agrees with the manifest."""
        manifest, header = self.manifest, reader.header
        found = (
            *(header.direction, header.unit, header.tokenizer_sha256, header.id_bytes),
            *(header.frame_tokens, header.row_tokens, header.dictionary_sha256),
        )
        expected = (
            *manifest.text_format.to_dict().values(),
            *(manifest.id_bytes, manifest.frame_tokens),
            *(manifest.row_tokens, manifest.dictionary_sha256),
        )
        if found != expected:
            raise ShardCorruptError(
                f"the shard {reader.shown} belongs to another data set: its header has {found}, "
                f"the manifest {expected}; restore it or build the shards again"
            )
        if reader.file_bytes != entry.file_bytes:
            raise ShardCorruptError(
                f"the shard {reader.shown} is not the one in the manifest: it has "
                f"{reader.file_bytes} bytes instead of {entry.file_bytes}; "
                "restore it or build the shards again"
            )
        counted = (header.tokens, header.documents, header.text_bytes)
        promised = (entry.tokens, entry.documents, entry.text_bytes)
        if counted != promised:
            raise ShardCorruptError(
                f"the shard {reader.shown} is not the one in the manifest, which has tokens, "
                f"documents and bytes of text {promised}, not {counted}; "
                "restore the one that changed or build the shards again"
            )

    def require_codec(self, codec: TextCodec) -> None:
        """Raises TokenizerMismatchError or ShardCorruptError for a codec of other shards."""
        shown, manifest = self.name, self.manifest
        if codec.format.tokenizer_sha256 != manifest.text_format.tokenizer_sha256:
            raise TokenizerMismatchError(
                f"{shown}/{codec.file_name} has sha256 {codec.format.tokenizer_sha256[:12]}, but "
                f"the shards beside it were made with {manifest.text_format.tokenizer_sha256[:12]};"
                " restore that tokenizer"
            )
        of_codec = (codec.vocab_size, codec.begin_id, codec.end_id, codec.id_dtype.itemsize)
        found = (manifest.vocab_size, manifest.begin_id, manifest.end_id, manifest.id_bytes)
        if found != of_codec:
            raise ShardCorruptError(
                f"{shown}/{MANIFEST_NAME} has pieces, begin id, end id and bytes per id {found}, "
                f"its tokenizer {of_codec}; restore it or build the shards again"
            )


def changed_shard(reader: ShardReader) -> ShardCorruptError:
    """The error for a shard whose hash is not that of its entry."""
    return ShardCorruptError(
        f"the shard {reader.shown} is intact but not the one in the manifest; "
        "restore it or build the shards again"
    )
