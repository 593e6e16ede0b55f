"""fsspec's drivers: opened by address, called with time limits and retries, one sentence an error.

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
    """The file system of an address. A process that was forked with it opens one of its own."""

    def __init__(self, url: str) -> None:
        """Raises as `open_file_system`."""
        self._url = url
        file_system, self.path = open_file_system(url)
        """The address as the file system takes it."""
        self._opened = os.getpid(), file_system

    def file_system(self) -> Any:
        """The file system of this process. Raises as `open_file_system`."""
        # No lock, which a fork could leave held: at worst, two threads open one each.
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_file_system(self._url)[0]
        return self._opened[1]


def open_file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the address as it takes it, secrets and all.

    Some drivers connect here. Raises SourceMissingError, BackendError, SourceUnreadableError, and
    ConfigError for a variable that is not set.
    """
    import fsspec

    shown = shown_url(url)
    url = expanded(url)
    protocol, separator, rest = url.partition("://")
    protocol = protocol.lower()
    url = f"{protocol}{separator}{rest}"
    if not rest.strip("/"):
        raise SourceMissingError(f"{shown}: names no file; write `{protocol}://` and its address")
    if "::" in url and protocol not in HTTP:
        raise SourceMissingError(
            f"{shown}: a file within a file (`::`) cannot be read in parts; "
            "unpack it and name the folder"
        )

    def start() -> tuple[Any, str]:
        try:
            if protocol in HTTP:
                return fsspec.filesystem(protocol, client_kwargs=dict(CLIENT_OPTIONS)), url
            file_system, path = fsspec.url_to_fs(url)
        except ImportError as error:
            raise BackendError(
                f"{shown}: {reason_of(error)}; {protocol}:// needs that package"
            ) from None
        except ValueError as error:
            raise SourceMissingError(f"{shown}: {reason_of(error)}; check the address") from None
        return file_system, path

    return guarded(url, start)


def require_reachable(file_system: Any) -> None:
    """Raises UnresolvedHostError when it is the hub's, and the hub cannot be found."""
    if file_system.protocol == "hf":
        require_hub()


def call(file_system: Any, method: str, *arguments: Any, timeout_s: float, **options: Any) -> Any:
    """A method of a file system, with a time limit where the file system can be interrupted."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(file_system, AsyncFileSystem):
        function = getattr(file_system, f"_{method}")
        return sync(file_system.loop, function, *arguments, timeout=timeout_s, **options)
    return getattr(file_system, method)(*arguments, **options)


def guarded(url: str, attempt: Callable[[], Result]) -> Result:
    """The result of an attempt with retries; whatever a driver raises becomes one sentence.

    Raises FileNotFoundError as it is, since only the caller knows what it means.
    """
    try:
        return with_retries(shown_url(url), attempt)
    except (MegabackError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - each driver has errors of its own
        raise SourceUnreadableError(
            f"{shown_url(url)}: {reason_of(error)}; "
            "check the address, and that you are allowed to read it"
        ) from None
