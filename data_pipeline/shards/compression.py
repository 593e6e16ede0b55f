"""How the frames of a shard are compressed."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import zstandard

DEFAULT_LEVEL = 6


@dataclass(frozen=True)
class Compression:
    """How frames are compressed. It changes a file's bytes, never what is read from it."""

    level: int = DEFAULT_LEVEL
    long_distance: bool = False
    dictionary: bytes | None = None

    @property
    def dictionary_sha256(self) -> str | None:
        return None if self.dictionary is None else read_dictionary(self.dictionary)[0]

    def zstd_dictionary(self) -> zstandard.ZstdCompressionDict | None:
        return None if self.dictionary is None else read_dictionary(self.dictionary)[1]

    def compressor(self) -> zstandard.ZstdCompressor:
        """A compressor of frames, with content checksums, sizes and the dictionary's id."""
        # Given as a level, not as a table of numbers, so that zstd fits them to each frame's size.
        parameters = zstandard.ZstdCompressionParameters(
            compression_level=self.level,
            enable_ldm=self.long_distance,
            write_checksum=True,
            write_content_size=True,
            write_dict_id=True,
        )
        return zstandard.ZstdCompressor(
            compression_params=parameters, dict_data=self.zstd_dictionary()
        )


DEFAULT_COMPRESSION = Compression()


@lru_cache(maxsize=2)
def read_dictionary(dictionary: bytes) -> tuple[str, zstandard.ZstdCompressionDict]:
    """Its SHA-256, and what zstd makes of it: once for all shards that are open."""
    # Never as raw content, whose frames would not say that they need it.
    made = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)
    return hashlib.sha256(dictionary).hexdigest(), made
