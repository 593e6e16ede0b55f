"""Zstandard compression of the frames of a shard."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import zstandard

DEFAULT_LEVEL = 6


@dataclass(frozen=True)
class Compression:
    """Compression settings. They change a file's bytes, never the decoded frames."""

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
        # A level rather than explicit parameters: zstd then fits them to each frame's size.
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
    """SHA-256 of a dictionary, and its zstd object: one for all open shards."""
    # Never as raw content, whose frames would not carry the dictionary's id.
    made = zstandard.ZstdCompressionDict(dictionary, dict_type=zstandard.DICT_TYPE_FULLDICT)
    return hashlib.sha256(dictionary).hexdigest(), made
