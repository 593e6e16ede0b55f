"""Standard output and standard error, protected so that printing cannot interrupt work.

Output is either a result (`megaback sample`) or a comment on work whose result is elsewhere (a run,
a folder of shards). A comment that cannot be printed, because its reader exited, the terminal was
closed or the log's disk is full, is dropped and the work continues. A result that cannot be printed
is an error. Standard error is always a comment.

In comments, and in everything printed to a terminal, control characters are escaped. A result in a
pipe or a file is exact.
"""

import codecs
import io
import os
import select
import sys
from typing import IO, TYPE_CHECKING, cast

from data_pipeline.common.control_characters import escaped
from data_pipeline.common.driver_reports import scrub_reports

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_NAMES = {1: "standard output", 2: "standard error"}


class ReaderGoneError(BrokenPipeError):
    """The reader of this process's result has exited."""


class _Stream(io.FileIO):
    """An output descriptor. After its first error, all output is dropped."""

    def __init__(self, descriptor: int, *, is_comment: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_comment = is_comment
        self.timeout_s: float | None = None
        """Maximum time that a write waits for a stalled reader, in seconds; None: no limit."""
        self.loss: str | None = None
        self._is_stalled = False
        self._dropped_bytes = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Returns the number of bytes written or dropped."""
        view = memoryview(data).cast("B")
        if self.loss is not None:
            return len(view)
        try:
            return self._write_some(view)
        except OSError as error:
            self.loss = error.strerror or str(error)
            if self.is_comment:
                return len(view)
            if isinstance(error, BrokenPipeError):
                raise ReaderGoneError(error.errno, error.strerror) from None
            error.filename = _NAMES.get(self.fileno())
            raise

    def _write_some(self, view: memoryview) -> int:
        while True:
            if self.timeout_s is not None:
                if not self._is_writable():
                    self._dropped_bytes += len(view)
                    return len(view)
                view = view[: select.PIPE_BUF]  # the size that a pipe accepts without blocking
            if (written := super().write(view)) is not None:
                return written
            self._wait(None)  # the descriptor is non-blocking

    def _is_writable(self) -> bool:
        assert self.timeout_s is not None
        if not self._wait(0.0 if self._is_stalled else self.timeout_s):
            self._is_stalled = True
            return False
        if self._is_stalled:
            self._is_stalled = False
            note = f"\n[{self._dropped_bytes:,} bytes were dropped while the reader was stalled]\n"
            self._dropped_bytes = 0
            super().write(note.encode())
        return True

    def _wait(self, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _bytes_of_names(error: UnicodeError) -> tuple[bytes, int]:
    """Codec error handler: bytes for surrogate escapes of file names, else escape sequences."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    try:
        return part.encode(error.encoding, "surrogateescape"), error.end
    except UnicodeEncodeError:
        return part.encode(error.encoding, "backslashreplace"), error.end


codecs.register_error("megaback.names", _bytes_of_names)


class _ShownBytes(io.BufferedWriter):
    """Escapes control characters in comments and terminal output.

    It is the buffer of `sys.stdout`, so that nothing printed bypasses it.
    """

    def __init__(self, stream: _Stream, encoding: str) -> None:
        super().__init__(stream)
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("backslashreplace")

    def write(self, data: "ReadableBuffer", /) -> int:
        if not self._is_terminal and not self._stream.is_comment:
            return super().write(data)
        view = memoryview(data).cast("B")
        shown = escaped(self._decoder.decode(view))
        super().write(shown.encode(self._encoding, "backslashreplace"))
        return len(view)


class _Text(io.TextIOWrapper):
    """A standard text stream, with an unescaped stream for terminal layout."""

    def __init__(self, stream: _Stream, encoding: str, errors: str, write_through: bool) -> None:
        self.trusted = _Trusted(self, stream, encoding)
        """Stream for megaback's own escape sequences, such as colors, around escaped text."""
        super().__init__(
            _ShownBytes(stream, encoding),
            encoding=encoding,
            errors="megaback.names" if errors in ("strict", "surrogateescape") else errors,
            newline="\n",
            line_buffering=stream.fileno() == 2 or stream.isatty(),
            write_through=write_through,
        )


class _Trusted(io.TextIOWrapper):
    """Writes unescaped text immediately, after flushing earlier output."""

    def __init__(self, printed: io.TextIOWrapper, stream: _Stream, encoding: str) -> None:
        buffer = io.BufferedWriter(stream)
        super().__init__(buffer, encoding=encoding, errors="backslashreplace", newline="\n")
        self._printed = printed

    def write(self, text: str, /) -> int:
        self._printed.flush()
        written = super().write(text)
        self.flush()
        return written


def trusted(stream: IO[str]) -> IO[str]:
    """The stream that does not escape, for megaback's own escape sequences."""
    return cast("IO[str]", getattr(stream, "trusted", stream))


def protect_console() -> None:
    """Replace the standard streams of this process; repeated calls have no effect.

    Standard output is a result until `only_comments`. Closed descriptors are opened on the null
    device: otherwise the next opened file would become the console. Secrets are removed from
    reports of libraries.
    """
    scrub_reports()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _protected(sys.stdout, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _protected(sys.stderr, 2)  # type: ignore[misc]


def only_comments(timeout_s: float | None = None) -> None:
    """Declare both output streams of this process comments on its work.

    With `timeout_s`, a stalled reader (a stopped terminal, a waiting pager) delays the work by this
    many seconds once; then output is dropped until it reads again.
    """
    for stream in _streams():
        stream.is_comment = True
        stream.timeout_s = timeout_s


def console_losses() -> dict[str, str]:
    """Reason by name of each stream that failed."""
    return {
        _NAMES[stream.fileno()]: stream.loss for stream in _streams() if stream.loss is not None
    }


def is_result_unread() -> bool:
    """Whether the reader of a result has exited."""
    return any(not stream.is_comment and stream.loss is not None for stream in _streams())


def _streams() -> list[_Stream]:
    raws = [getattr(getattr(one, "buffer", None), "raw", None) for one in (sys.stdout, sys.stderr)]
    return [raw for raw in raws if isinstance(raw, _Stream)]


def _protected(stream: IO[str] | None, descriptor: int) -> io.TextIOWrapper:
    if isinstance(stream, _Text):
        return stream
    is_text = isinstance(stream, io.TextIOWrapper)
    if stream is not None and is_text:
        stream.flush()
    raw = _Stream(descriptor, is_comment=descriptor == 2)
    raw.name = f"<{'stdout' if descriptor == 1 else 'stderr'}>"
    return _Text(
        raw,
        encoding=stream.encoding if is_text else "utf-8",  # type: ignore[union-attr]
        errors=stream.errors if is_text else "backslashreplace",  # type: ignore[union-attr]
        write_through=is_text and stream.write_through,  # type: ignore[union-attr]
    )
