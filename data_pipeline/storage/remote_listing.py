"""Listing of remote files, for every file system of fsspec."""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.storage import retries
from data_pipeline.storage.address_variables import expanded
from data_pipeline.storage.drivers import call, guarded, open_file_system, require_reachable
from data_pipeline.storage.urls import is_http


def find(url: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Files matched by an address or pattern, files below each matched folder, and hidden files.

    Hidden files are not in the first two. An HTTP address is one file. Raises SourceMissingError,
    SourceUnreadableError, BackendError.
    """
    if is_http(url):
        return [url], [], []  # its existence is checked later
    file_system, path = open_file_system(url)
    timeout_s = retries.POLICY.listing_timeout_s
    address_of = _addresses(url, file_system, path)

    def look() -> tuple[list[str], list[list[str]], list[str]]:
        require_reachable(file_system)
        file_system.invalidate_cache()
        pinned = _pinned(path) if file_system.protocol == "hf" else path
        try:
            found = {pinned: call(file_system, "info", pinned, timeout_s=timeout_s)}
        except FileNotFoundError:
            found = call(file_system, "glob", pinned, detail=True, timeout_s=timeout_s)
        files: list[str] = []
        folders: list[list[str]] = []
        hidden: list[str] = []
        for name, info in found.items():
            if name != pinned and _is_hidden(name):
                hidden.append(address_of(name))
            elif info["type"] == "directory":
                folders.append([])
                for other in call(file_system, "find", name, timeout_s=timeout_s):
                    some = hidden if _is_hidden(other, name) else folders[-1]
                    some.append(address_of(other))
            else:
                files.append(address_of(name))
        return files, folders, hidden

    try:
        return guarded(url, look)
    except FileNotFoundError:
        return [], [], []


def _addresses(url: str, file_system: Any, path: str) -> Callable[[str], str]:
    """Function from a listed name to an address.

    Names listed by drivers that connect to a host (sftp, ftp) lack host and login.
    """
    protocol, separator, rest = url.partition("://")
    authority = rest.partition("/")[0]
    whole = expanded(url).partition("://")[2]
    if path.startswith("/") and whole.endswith(path) and whole != path:
        return lambda name: f"{protocol}{separator}{authority}{name}"
    unstripped: Callable[[str], str] = file_system.unstrip_protocol
    return unstripped


def _pinned(path: str) -> str:
    """Path on the Hugging Face hub, pinned to the current commit."""
    from huggingface_hub import HfApi, HfFileSystem

    resolved: Any = HfFileSystem().resolve_path(path)
    if not hasattr(resolved, "repo_id"):  # a bucket has no commits
        return path
    kind, name, revision = resolved.repo_type, resolved.repo_id, resolved.revision
    commit = HfApi().repo_info(name, repo_type=kind, revision=revision).sha
    return f"{resolved.root.partition('@')[0]}@{commit}/{resolved.path_in_repo}".rstrip("/")


def _is_hidden(name: str, folder: str | None = None) -> bool:
    """Whether a name or, below a folder, any component begins with a dot."""
    path = PurePosixPath(name.removeprefix(folder or ""))
    return any(part.startswith(".") for part in (path.parts if folder else (path.name,)))
