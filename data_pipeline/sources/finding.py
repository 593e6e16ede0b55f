"""Discovery of a source's files: readable ones, and skipped ones by cause.

All skipped files are counted: hidden files, unsupported suffixes, texts next to data. Links to
folders are followed, each folder once, so that cycles end.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from data_pipeline.common.local_paths import local_path
from data_pipeline.errors import SourceMissingError
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.sources.files import SUFFIXES, kind_of, stat_address, suffix_of
from data_pipeline.sources.skipped import FILES, Skipped, count_skipped, merged, skipped_lines
from data_pipeline.sources.zip_files import zip_members
from data_pipeline.storage import remote_listing

_MAX_CAUSES = 30  # a folder of logs has a suffix for each day
_TEXT_BESIDE_DATA = "text beside data, often a README or a license: name such files to read them"
_LINK_TO_READ = "link to a folder that is read already"


@dataclass
class _Found:
    """Files named by a source, before they are filtered."""

    files: list[str] = field(default_factory=list)
    """Files named directly or matched by a pattern."""
    folders: list[list[str]] = field(default_factory=list)
    """Files below each named or matched folder."""
    excluded: list[tuple[str, str]] = field(default_factory=list)
    """Cause and address of each skipped file."""
    linked: list[str] = field(default_factory=list)
    """Targets of the links to folders that were followed."""


@dataclass(frozen=True)
class Files:
    """Files of a source."""

    readable: list[str]
    """Addresses of the files, sorted."""
    skipped: Skipped
    linked: list[str]
    """Targets of links to folders outside the source."""


def find_files(source: str, *, html: bool = False) -> Files:
    """Find the files of a source.

    `html`: whether HTML pages are read. Raises OSError, SourceMissingError, SourceUnreadableError,
    BackendError.
    """
    path = local_path(source)
    if path is None:
        files, folders, hidden = remote_listing.find(source)
        found = _Found(files, folders, [("hidden", address) for address in hidden])
    elif source in ("", "file://"):  # Path("") is the working directory
        found = _Found()
    else:
        found = _find_local(path)
    shown = shown_url(source)
    if not found.files and not found.folders:
        raise SourceMissingError(
            f"{shown or '(empty)'}: no such file or folder, and no file matches it as a "
            "pattern; a source is `novels`, `pydocs`, a path, a URL, a quoted pattern, or "
            "`hf:NAME` on the hub"
        )
    finder = _Sorter(html, found.excluded)
    readable = set(finder.readable(found.files))
    for below in found.folders:
        readable.update(finder.data_of(below))
    # Of overlapping matches of a pattern, one may read files that another skips.
    skipped = _counted({each for each in finder.excluded if each[1] not in readable})
    if not readable:
        why = "; ".join(skipped_lines(skipped))
        raise SourceMissingError(
            f"{shown}: no file has a supported suffix{why and f' ({why})'}: {SUFFIXES}"
        )
    in_order = sorted(readable, key=lambda address: address.split("/"))
    return Files(in_order, skipped, found.linked)


class _Sorter:
    """Separates readable files from others, and records the causes of those."""

    def __init__(self, html: bool, excluded: list[tuple[str, str]]) -> None:
        self._html = html
        self.excluded = excluded

    def readable(self, files: Iterable[str]) -> dict[str, str]:
        """Readable files, each as `data` or `text`."""
        kinds = {}
        for address in files:
            kind = kind_of(address)
            if kind == "html" and not self._html:
                self._exclude("an HTML page, which is read with `html`", address)
            elif kind is None:
                suffix = suffix_of(address)
                cause = f"suffix {suffix} is not read" if suffix else "name without a suffix"
                self._exclude(cause, address)
            elif not _is_regular(address):
                self._exclude("not a regular file", address)
            elif kind != "zip":
                kinds[address] = "text" if kind in ("text", "html") else "data"
            elif kind := self._kind_of_zip(address):
                kinds[address] = kind
        return kinds

    def data_of(self, files: Iterable[str]) -> list[str]:
        """Data files of a folder; its text files if it has no others."""
        kinds = self.readable(files)
        if "data" not in kinds.values():
            return list(kinds)
        for address, kind in kinds.items():
            if kind == "text":
                self._exclude(_TEXT_BESIDE_DATA, address)
        return [address for address, kind in kinds.items() if kind == "data"]

    def _kind_of_zip(self, address: str) -> str | None:
        members, excluded = zip_members(stat_address(address), html=self._html)
        for cause, member in excluded:
            self._exclude(cause, f"{address}/{member}")
        if not members:
            self._exclude("zip without a file that can be read", address)
            return None
        return "text" if members[0].is_text else "data"

    def _exclude(self, cause: str, address: str) -> None:
        self.excluded.append((cause, address))


def _counted(excluded: set[tuple[str, str]]) -> Skipped:
    numbers = Counter(cause for cause, _ in excluded)
    frequent = sorted(numbers, key=lambda cause: (-numbers[cause], cause))[:_MAX_CAUSES]
    skipped: Skipped = {}
    for cause, address in sorted(excluded, key=lambda item: (item[0], item[1].split("/"))):
        shown = shown_url(address)
        count_skipped(skipped, FILES, cause if cause in frequent else "other suffixes", shown)
    return merged([skipped])


def _is_regular(address: str) -> bool:
    """Whether an address is a regular file or missing; a dangling link fails when it is read."""
    if is_url(address):
        return True
    try:
        return stat.S_ISREG(os.stat(address).st_mode)  # noqa: PTH116
    except FileNotFoundError:
        return True


def _find_local(path: Path) -> _Found:
    # Path.glob rejects absolute patterns.
    matches = [path] if path.exists() else glob.glob(str(path), recursive=True)  # noqa: PTH207
    # Not resolved: the link targets of a hub cache have no suffix.
    found = _Found()
    for match in sorted({os.path.abspath(match) for match in matches}):  # noqa: PTH100
        if not os.path.lexists(match):
            continue  # a cycle of links
        if not os.path.isdir(match):  # noqa: PTH112
            found.files.append(match)
        else:
            found.folders.append(list(_files_below(match, found)))
    if "**" in str(path):
        _keep_one_way_to_each_file(found)
    return found


def _keep_one_way_to_each_file(found: _Found) -> None:
    """Keep only the path with fewest links of each file that `**` finds on several paths."""
    is_link = cache(os.path.islink)

    def num_links(address: str) -> int:
        return sum(is_link(str(parent)) for parent in Path(address).parents)

    ways: dict[tuple[str, str], list[str]] = {}
    for address in {*found.files, *(each for below in found.folders for each in below)}:
        folder, name = os.path.split(address)
        ways.setdefault((os.path.realpath(folder), name), []).append(address)
    kept = {
        min(each, key=lambda way: (num_links(way), way.count("/"), way)) for each in ways.values()
    }
    found.files = [address for address in found.files if address in kept]
    found.folders = [[each for each in below if each in kept] for below in found.folders]


def _files_below(root: str, found: _Found) -> Iterator[str]:
    """Files below a folder and below linked folders, each folder once.

    Real folders come first, so that links do not change their paths.
    """

    def stop(error: OSError) -> None:
        raise error

    above = {str(parent) for parent in Path(root).resolve().parents}
    seen: set[tuple[int, int]] = set()
    links = [root]
    while links:
        start = links.pop(0)
        if start != root and (os.path.realpath(start) in above or _identity(start) in seen):
            found.excluded.append((_LINK_TO_READ, start))
            continue
        if start != root:
            found.linked.append(os.path.realpath(start))
        for folder, subfolders, names in os.walk(start, onerror=stop):
            seen.add(_identity(folder))
            hidden = [name for name in (*subfolders, *names) if name.startswith(".")]
            found.excluded += [("hidden", f"{folder}/{name}") for name in hidden]
            real = []
            for name in subfolders:
                path = f"{folder}/{name}"
                if name in hidden:
                    continue
                if os.path.islink(path):  # noqa: PTH114
                    links.append(path)
                elif _identity(path) in seen:
                    found.excluded.append((_LINK_TO_READ, path))
                else:
                    real.append(name)
            subfolders[:] = real
            yield from (f"{folder}/{name}" for name in names if name not in hidden)
        links.sort()


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116
    return status.st_dev, status.st_ino
