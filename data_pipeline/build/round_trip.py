"""Round trip of imported ids: what the shards of a task hold is what its sources held.

The ids are hashed as they are read, with the length of each document, and again as they are read
back from the finished shards, in the order of the text and without markers.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.reader import ShardReader
from data_pipeline.text.codec import TextCodec


class _Digest:
    """Hash of documents in order, and their number."""

    def __init__(self) -> None:
        self.documents = 0
        self._sha256 = hashlib.sha256()

    def add(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        self.documents += 1
        self._sha256.update(len(ids).to_bytes(8, "little"))
        self._sha256.update(ids.astype("<i8").data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class RoundTrip:
    """Hashes the ids of each split as they come from the sources, then from the shards."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._sources: dict[str, _Digest] = defaultdict(_Digest)

    def add(self, split: str, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Add the ids of a document of a source, in the order of the text."""
        self._sources[split].add(ids)

    def verify(self, folder: Path, shards: Iterable[ShardEntry]) -> None:
        """Raises ShardCorruptError unless finished shards hold what was added, in this order."""
        for split, source in self._sources.items():
            stored = _Digest()
            files = [folder / shard.file for shard in shards if shard.split == split]
            for file in files:
                with ShardReader(file, vocab_size=self._codec.vocab_size) as reader:
                    for document in reader.documents():
                        try:
                            stored.add(self._codec.ids_of(document))
                        except ValueError as error:
                            raise _differs(
                                file, f"document {stored.documents:,}: {error}"
                            ) from None
            if stored.documents != source.documents:
                counted = f"{stored.documents:,} documents, not {source.documents:,}"
                raise _differs(files[0], f"it and those that follow hold {counted}")
            if stored.hexdigest() != source.hexdigest():
                raise _differs(files[0], "it or one that follows holds other ids")


def _differs(file: Path, problem: str) -> ShardCorruptError:
    return ShardCorruptError(
        f"the shard {file} is not what the source held: {problem}; check the disk and the memory "
        "of this machine, and run the same command again"
    )
