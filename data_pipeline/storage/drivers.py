"""Access to fsspec's drivers, with timeouts, retries and readable errors.

Why not obstore: docs/decisions/0041-one-range-reader.md
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from data_pipeline.errors import (
    BackendError,
    MegabackError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.redaction import shown_url
from data_pipeline.storage.address_variables import expanded
from data_pipeline.storage.http_ranges import CLIENT_OPTIONS
from data_pipeline.storage.retries import reason_of, require_hub, with_retries
from data_pipeline.storage.urls import HTTP

Result = TypeVar("Result")


class Driver:
    """The file system of an address, reopened after a fork."""

    def __init__(self, url: str) -> None:
        """Raises as `open_file_system`."""
        self._url = url
        file_system, self.path = open_file_system(url)
        """Path of the address in the file system."""
        self._opened = os.getpid(), file_system

    def file_system(self) -> Any:
        """The file system of this process. Raises as `open_file_system`."""
        # No lock, which could be held during a fork: at worst, two threads open one each.
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_file_system(self._url)[0]
        return self._opened[1]


def open_file_system(url: str) -> tuple[Any, str]:
    """File system of an address, and the path in it, with secrets.

    Some drivers connect here. Raises SourceMissingError, BackendError, SourceUnreadableError, and
    ConfigError for an unset variable.
    """
    import fsspec

    shown = shown_url(url)
    url = expanded(url)
    protocol, separator, rest = url.partition("://")
    protocol = protocol.lower()
    url = f"{protocol}{separator}{rest}"
    if not rest.strip("/"):
        raise SourceMissingError(
            f"{shown}: it has no path; write `{protocol}://` and the path of a file"
        )
    if "::" in url and protocol not in HTTP:
        raise SourceMissingError(
            f"{shown}: files within archives (`::`) are not supported; "
            "unpack the archive and name the folder"
        )

    def start() -> tuple[Any, str]:
        try:
            if protocol in HTTP:
                return fsspec.filesystem(protocol, client_kwargs=dict(CLIENT_OPTIONS)), url
            file_system, path = fsspec.url_to_fs(url)
        except ImportError as error:
            raise BackendError(
                f"{shown}: {protocol}:// needs a package that is not installed; {reason_of(error)}"
            ) from None
        except ValueError as error:
            raise SourceMissingError(f"{shown}: {reason_of(error)}; check the address") from None
        return file_system, path

    return guarded(url, start)


def require_reachable(file_system: Any) -> None:
    """Raises UnresolvedHostError for the hub's file system if the hub's host cannot be resolved."""
    if file_system.protocol == "hf":
        require_hub()


def call(file_system: Any, method: str, *arguments: Any, timeout_s: float, **options: Any) -> Any:
    """Call a method of a file system, with a timeout if the file system is asynchronous."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(file_system, AsyncFileSystem):
        function = getattr(file_system, f"_{method}")
        return sync(file_system.loop, function, *arguments, timeout=timeout_s, **options)
    return getattr(file_system, method)(*arguments, **options)


def guarded(url: str, attempt: Callable[[], Result]) -> Result:
    """Call `attempt` with retries; convert errors of drivers to SourceUnreadableError.

    Raises FileNotFoundError unchanged, since its meaning depends on the caller.
    """
    try:
        return with_retries(shown_url(url), attempt)
    except (MegabackError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - each driver has its own errors
        raise SourceUnreadableError(
            f"{shown_url(url)}: {reason_of(error)}; "
            "check the address and your permission to read it"
        ) from None
