"""Standard output and standard error, such that printing never harms the work.

What a process prints is its result (`megaback sample`) or a comment on work whose result lies
elsewhere (a run, a folder of shards). A comment that cannot be printed, because its reader ended,
the terminal was closed or the log's disk is full, is dropped and the work continues. A result that
cannot be printed is an error. Standard error is always a comment.

Comments, and everything that goes to a terminal, are text for people: control characters in them
are escaped. A result in a pipe or a file is exact.
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
    """Whoever read the result that this process prints has ended."""


class _Stream(io.FileIO):
    """A descriptor that is printed to. After its first error everything is dropped."""

    def __init__(self, descriptor: int, *, is_comment: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_comment = is_comment
        self.timeout_s: float | None = None
        """Maximum time that a write waits for a reader that does not read, in seconds; None: no
        limit."""
        self.loss: str | None = None
        self._is_stalled = False
        self._dropped_bytes = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        """Returns how many bytes are done with, dropped ones included."""
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
                view = view[: select.PIPE_BUF]  # as much as a pipe takes without waiting
            if (written := super().write(view)) is not None:
                return written
            self._wait(None)  # the reader has made the descriptor non-blocking

    def _is_writable(self) -> bool:
        assert self.timeout_s is not None
        if not self._wait(0.0 if self._is_stalled else self.timeout_s):
            self._is_stalled = True
            return False
        if self._is_stalled:
            self._is_stalled = False
            note = f"\n[{self._dropped_bytes:,} bytes were not printed: nobody read them]\n"
            self._dropped_bytes = 0
            super().write(note.encode())
        return True

    def _wait(self, timeout_s: float | None) -> bool:
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def _bytes_of_names(error: UnicodeError) -> tuple[bytes, int]:
    """What UTF-8 does not have: the bytes of a file's name, or an escape for a lone surrogate."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    try:
        return part.encode(error.encoding, "surrogateescape"), error.end
    except UnicodeEncodeError:
        return part.encode(error.encoding, "backslashreplace"), error.end


codecs.register_error("megaback.names", _bytes_of_names)


class _ShownBytes(io.BufferedWriter):
    """Bytes on their way to people: text in the stream's encoding, whose control characters are
    escaped. This is below `sys.stdout.buffer`, so that nothing that prints goes around it."""

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
    """A standard stream of text, beside which those that lay out terminals have a way of theirs."""

    def __init__(self, stream: _Stream, encoding: str, errors: str, write_through: bool) -> None:
        self.trusted = _Trusted(self, stream, encoding)
        """Stream for our own escape sequences, such as colors: around text that has been
        escaped."""
        super().__init__(
            _ShownBytes(stream, encoding),
            encoding=encoding,
            errors="megaback.names" if errors in ("strict", "surrogateescape") else errors,
            newline="\n",
            line_buffering=stream.fileno() == 2 or stream.isatty(),
            write_through=write_through,
        )


class _Trusted(io.TextIOWrapper):
    """Writes at once, after what was printed before."""

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
    """Where escape sequences of ours go: around the escaping of what is printed to a stream."""
    return cast("IO[str]", getattr(stream, "trusted", stream))


def protect_console() -> None:
    """Replace the standard streams of this process; what was replaced already stays.

    Standard output counts as a result until `only_comments`. Descriptors that are closed are opened
    on the null device, or else the next file that is opened would be taken for the console. What
    libraries print is scrubbed.
    """
    scrub_reports()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _protected(sys.stdout, 1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _protected(sys.stderr, 2)  # type: ignore[misc]


def only_comments(timeout_s: float | None = None) -> None:
    """Declare that what this process prints is a comment on its work, on both streams.

    With `timeout_s`, a reader that does not read (a stopped terminal, a pager that waits) holds
    the work up for this long, once; then what it does not take is dropped.
    """
    for stream in _streams():
        stream.is_comment = True
        stream.timeout_s = timeout_s


def console_losses() -> dict[str, str]:
    """The streams that can no longer be printed to, and the reason of each."""
    return {
        _NAMES[stream.fileno()]: stream.loss for stream in _streams() if stream.loss is not None
    }


def is_result_unread() -> bool:
    """Whether the reader of a result has ended."""
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
