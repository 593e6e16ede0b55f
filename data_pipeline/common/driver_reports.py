"""Removal of secrets from logs, warnings and tracebacks of libraries."""

import logging
import sys
import threading
import traceback
import warnings
from contextlib import suppress
from types import TracebackType
from typing import Any

from data_pipeline.redaction import scrub

_is_installed = False


def scrub_reports() -> None:
    """Remove secrets from all log records, warnings and tracebacks of this process."""
    global _is_installed
    if _is_installed:
        return
    _is_installed = True
    make_record, show_warning = logging.getLogRecordFactory(), warnings.showwarning

    def make_clean_record(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make_record(*arguments, **options)
        with suppress(Exception):  # logging itself reports formatting errors
            record.msg, record.args = scrub(record.getMessage()), ()
        return record

    def show_clean_warning(message: Warning | str, *arguments: Any, **options: Any) -> None:
        show_warning(scrub(str(message)), *arguments, **options)

    logging.setLogRecordFactory(make_clean_record)
    warnings.showwarning = show_clean_warning
    sys.excepthook = print_exception
    threading.excepthook = _print_exception_of_thread


def print_exception(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    """Print a traceback to standard error."""
    if sys.stderr is not None:
        sys.stderr.write(scrub("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()


def _print_exception_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is not SystemExit:
        print_exception(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)
