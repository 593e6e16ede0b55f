"""Tables, progress bars and live text by rich, with escaped control characters.

Rich's own escape sequences bypass the escaping of `data_pipeline.common.console`, so text is
escaped here. Rich's markup is off: square brackets are text.
"""

import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress import Progress
from rich.segment import Segment

from data_pipeline.common.console import trusted
from data_pipeline.common.control_characters import escaped


class SafeConsole(Console):
    """A console whose text is escaped."""

    def __init__(self, **options: Any) -> None:
        """`options`: arguments of rich's Console."""
        super().__init__(markup=False, emoji=False, **options)

    @property  # type: ignore[misc]
    def file(self) -> IO[str]:
        return trusted(super().file)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=escaped(segment.text))


class _Above(FileProxy):
    """Prints above the live display. Rich's own stream interprets escape sequences as styles."""

    def write(self, text: str) -> int:
        return super().write(escaped(text))


class _Redirection:
    """Redirects standard streams to print above a live display."""

    def __init__(self, console: Console) -> None:
        self._before = sys.stdout, sys.stderr
        if console.is_terminal:
            sys.stdout, sys.stderr = _Above(console, sys.stdout), _Above(console, sys.stderr)

    def end(self) -> None:
        sys.stdout, sys.stderr = self._before


class SafeLive(Live):
    """Live display with escaped text."""

    _redirection: _Redirection | None = None

    def start(self, refresh: bool = False) -> None:
        self._redirection = self._redirection or _Redirection(self.console)
        super().start(refresh)

    def stop(self) -> None:
        super().stop()
        if self._redirection is not None:
            self._redirection.end()
            self._redirection = None


class SafeProgress(Progress):
    """Progress bars with escaped text."""

    _redirection: _Redirection | None = None

    def start(self) -> None:
        if not self.disable:
            self._redirection = self._redirection or _Redirection(self.console)
        super().start()

    def stop(self) -> None:
        super().stop()
        if self._redirection is not None:
            self._redirection.end()
            self._redirection = None
