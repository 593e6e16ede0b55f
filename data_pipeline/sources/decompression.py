"""Streaming decompression with bounded memory.

Pieces are at most 128 KiB long. A decompressor's window is bounded before it is allocated: a header
can request gigabytes.
"""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import BinaryIO, Protocol

import zstandard

from data_pipeline.errors import SourceUnreadableError

COMPRESSIONS = {
    **dict.fromkeys((".gz", ".gzip"), "gz"),
    **dict.fromkeys((".zst", ".zstd"), "zst"),
    ".bz2": "bz2",
    **dict.fromkeys((".xz", ".lzma"), "xz"),
}
"""Compression method by suffix."""
CORRUPT_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
"""Errors for truncated and invalid compressed files."""

PIECE_BYTES = 128 << 10
DEFAULT_WINDOW_BYTES = 1 << 27
"""Maximum window of `zstd -d` without --long, and twice that of `xz -9`."""
_XZ_OVERHEAD_BYTES = 1 << 24  # memory of liblzma besides the dictionary
_MAX_EXPANSION = 1000  # text compresses to 1/100 at best; zeros to less than 1/1000
_MIN_EXPANDED_BYTES = 1 << 30

_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGICS = range(0x184D2A50, 0x184D2A60)
_LONGEST_ZSTD_HEADER_BYTES = 18
_RLE_BLOCK = 1


class _BombError(Exception):
    """A file expands, or requires memory, far more than text files do."""


def decompressed(
    stream: BinaryIO, suffix: str, shown: str, max_window_bytes: int = DEFAULT_WINDOW_BYTES
) -> Iterator[bytes]:
    """A stream's bytes in pieces, decompressed if the suffix is one of `COMPRESSIONS`.

    `shown`: its address, for messages. Raises SourceUnreadableError for a decompression bomb, or a
    window above both `max_window_bytes` and 128 MiB, and `CORRUPT_ERRORS`.
    """
    method = COMPRESSIONS.get(suffix.lower())
    if method is None:
        yield from blocks(stream)
        return
    counted = _Counted(stream)
    expanded_bytes = 0
    try:
        for piece in _decompress(method, counted, max(max_window_bytes, DEFAULT_WINDOW_BYTES)):
            expanded_bytes += len(piece)
            if not expands_like_text(expanded_bytes, counted.num_bytes):
                raise _BombError(
                    f"it expands to more than {_MAX_EXPANSION:,} times its size, unlike text; if "
                    "you trust it, decompress it and name the result"
                )
            yield piece
    except _BombError as error:
        raise SourceUnreadableError(f"{shown}: {error}") from None


def expands_like_text(expanded_bytes: int, num_bytes: int) -> bool:
    """Whether this expansion of `num_bytes` compressed bytes is plausible for text."""
    return expanded_bytes <= max(_MIN_EXPANDED_BYTES, _MAX_EXPANSION * num_bytes)


def blocks(stream: BinaryIO) -> Iterator[bytes]:
    """A stream's bytes in pieces, unchanged."""
    return iter(lambda: stream.read(PIECE_BYTES), b"")


def corrupt(address: str, reason: object) -> SourceUnreadableError:
    """The error for a truncated or invalid compressed file."""
    return SourceUnreadableError(
        f"{address}: truncated, or not of the format of its suffix ({reason}); fetch or write it "
        "again"
    )


class _Counted:
    """A stream that counts the bytes read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.num_bytes += len(data)
        return data


def _decompress(method: str, stream: _Counted, max_window_bytes: int) -> Iterator[bytes]:
    if method == "gz":
        with gzip.GzipFile(fileobj=stream, mode="rb") as inner:  # type: ignore[call-overload]
            yield from blocks(inner)
        return
    pieces = blocks(stream)  # type: ignore[arg-type]
    if method == "zst":
        yield from _decompress_zst(pieces, max_window_bytes)
    elif method == "bz2":
        yield from _decompress_streams(pieces, bz2.BZ2Decompressor, max_window_bytes)
    else:
        limit_bytes = max_window_bytes + _XZ_OVERHEAD_BYTES
        start = partial(lzma.LZMADecompressor, memlimit=limit_bytes)
        yield from _decompress_streams(pieces, start, max_window_bytes)


def _decompress_zst(pieces: Iterable[bytes], max_window_bytes: int) -> Iterator[bytes]:
    """Decompress all frames of a file by blocks, since 4 bytes may expand to a block of 128 KiB.

    The format is RFC 8878. Raises EOFError for a truncated last frame, which the library's own
    reader ignores.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
    source = _Source(pieces)
    while magic := source.peek(4):
        number = int.from_bytes(magic, "little")
        if number in _SKIPPABLE_MAGICS:
            header = source.take(8)
            source.skip(int.from_bytes(header[4:], "little"))
            continue
        if number != _ZSTD_MAGIC:
            raise zstandard.ZstdError("invalid magic number of a zstd frame")
        header = source.peek(_LONGEST_ZSTD_HEADER_BYTES)
        parameters = zstandard.get_frame_parameters(header)
        if parameters.window_size > max_window_bytes:
            raise _needs_memory(parameters.window_size, max_window_bytes)
        frame = decompressor.decompressobj()
        yield frame.decompress(source.take(zstandard.frame_header_size(header)))
        is_last = False
        while not is_last:
            header = source.take(3)
            fields = int.from_bytes(header, "little")
            is_last, kind, size_bytes = bool(fields & 1), fields >> 1 & 3, fields >> 3
            content = source.take(
                1 if kind == _RLE_BLOCK else min(size_bytes, zstandard.BLOCKSIZE_MAX + 1)
            )
            yield frame.decompress(header + content)
        if parameters.has_checksum:
            yield frame.decompress(source.take(4))


class _Source:
    """Buffered reader of pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._held = b""
        self._start = 0

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        while len(self._held) - self._start < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held, self._start = self._held[self._start :] + piece, 0
        return self._held[self._start : self._start + size]

    def take(self, size: int) -> bytes:
        """The next `size` bytes, consumed. Raises EOFError."""
        data = self.peek(size)
        if len(data) < size:
            raise EOFError("the last frame is not complete")
        self._start += size
        return data

    def skip(self, size: int) -> None:
        """Skip `size` bytes. Raises EOFError."""
        while size > 0:
            size -= len(self.take(min(size, zstandard.BLOCKSIZE_MAX)))


def _needs_memory(window_bytes: int | None, max_window_bytes: int) -> _BombError:
    wanted = "a larger window" if window_bytes is None else f"a window of {window_bytes:,} bytes"
    return _BombError(
        f"decompressing it needs {wanted}, and {max_window_bytes:,} bytes are allowed; raise "
        "`max_record_bytes` to that size, or compress it again without `zstd --long` or with a "
        "smaller dictionary"
    )


class _Decompressor(Protocol):
    """Common interface of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _decompress_streams(
    pieces: Iterable[bytes], start: Callable[[], _Decompressor], max_window_bytes: int
) -> Iterator[bytes]:
    """Decompress all streams of a file, with zero padding between them, in bounded pieces."""
    decompressor = None
    for piece in pieces:
        rest = piece
        while rest or (decompressor and not decompressor.needs_input):
            if decompressor is None:
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                decompressor = start()
            try:
                yield decompressor.decompress(rest, PIECE_BYTES)
            except OSError as error:  # raised by bz2 for invalid data
                raise EOFError(str(error)) from None
            except lzma.LZMAError as error:
                if "emory usage limit" in str(error):
                    raise _needs_memory(None, max_window_bytes) from None
                raise
            rest = decompressor.unused_data if decompressor.eof else b""
            decompressor = None if decompressor.eof else decompressor
    if decompressor:
        raise EOFError("the last stream is not complete")
