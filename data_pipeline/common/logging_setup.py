"""Logging to standard error, set up once per process.

All loggers are below `megaback`. Processes of commands, ranks and workers get one handler. A
program that imports megaback gets none and configures its own; until then, Python prints warnings.
"""

import logging
import os
from typing import Any

import click

from data_pipeline.common.control_characters import on_one_line
from data_pipeline.errors import ConfigError

LOG_VARIABLE = "MEGABACK_LOG"
LEVELS = ("debug", "info", "warning", "error")
_ALL = logging.getLogger("megaback")


class _StandardError(logging.Handler):
    """Writes to the current standard error, which progress bars replace."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            click.echo(self.format(record), err=True)
        except Exception:  # noqa: BLE001 (as every handler does)
            self.handleError(record)


class _Lines(logging.Formatter):
    """Formats `megaback: warning: …`, preceded by time and rank if there are several ranks."""

    rank: int | None = None

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (its name)
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        library = record.name.partition(".")[0]
        message = on_one_line(record.message) if library == "megaback" else record.message
        line = f"{library}: {level}{message}"
        if self.rank is None:
            return line
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} rank {self.rank}: {line}"


_LINES = _Lines()
_HANDLER = _StandardError()
_HANDLER.setFormatter(_LINES)


def set_up_logging() -> None:
    """Log at the level of MEGABACK_LOG, by default info.

    Warnings of other libraries have the same format. Raises ConfigError.
    """
    level = os.environ.get(LOG_VARIABLE) or "info"
    if level.lower() not in LEVELS:
        raise ConfigError(f"{LOG_VARIABLE} is {level!r}; set it to one of {', '.join(LEVELS)}")
    if not _is_set_up():
        logging.getLogger().addHandler(_HANDLER)
    _ALL.setLevel(level.upper())


def show_rank(rank: int) -> None:
    """Add time and rank to the log lines of this process."""
    _LINES.rank = rank


def verbose_option() -> click.Option:
    """`-v`, `--verbose`: debug messages of this process and its children."""
    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_verbose,
        help="Log debug messages too, to standard error.",
    )


def _set_verbose(_context: click.Context, _option: click.Parameter, is_verbose: Any) -> None:
    if is_verbose and _is_set_up():  # otherwise the calling program configures logging
        os.environ[LOG_VARIABLE] = "debug"
        set_up_logging()


def _is_set_up() -> bool:
    return _HANDLER in logging.getLogger().handlers
