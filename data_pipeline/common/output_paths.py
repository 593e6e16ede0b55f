"""Output paths: checks and atomic writes for every result of a command.

An output that is an input, or that megaback did not write, is refused before any work; an earlier
result is replaced only with `--overwrite`. Results are recognized by their contents (a marker, or
the keys of their format), not by name. An empty file or folder counts as absent. Devices and pipes
are written to directly. A file created at the path of a new result while the command runs is kept
(`writing_output`).
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click

from data_pipeline.common.abandoned import in_use, remove_abandoned
from data_pipeline.common.atomic import claim_name, new_id, replacing
from data_pipeline.common.local_paths import local_path
from data_pipeline.common.regular_files import is_device, read_file
from data_pipeline.errors import OutputExistsError

MAKER = "megaback"
_STDOUT = "-"
_TAIL_BYTES = 1 << 20
_MAX_OBJECT_BYTES = 64 << 20
"""Maximum size of a result that is one JSON object."""
_HEAD_BYTES = 4096

Recognizes = Callable[[Path], bool]

overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an existing result of this command."
)


def require_output(
    out: str | Path,
    inputs: Iterable[str | Path | None] = (),
    *,
    is_ours: Recognizes,
    overwrite: bool,
    option: str = "`out`",
) -> None:
    """Raises OutputExistsError unless a result may be written to a path.

    `inputs`: paths, patterns or URLs that the command reads. `is_ours` returns whether the file at
    the path is an earlier result.
    """
    if is_stream(out):
        return
    path = Path(out)
    require_apart(path, inputs, option)
    if is_vacant(path):
        return
    if not is_ours(path):
        raise OutputExistsError(
            f"{option} {path} holds something that this command did not write; choose another "
            f"{option}"
        )
    if not overwrite:
        raise OutputExistsError(
            f"{option} {path} contains an earlier result; add `overwrite` to replace it, or choose "
            f"another {option}"
        )


@contextmanager
def writing_output(path: Path, *, overwrite: bool) -> Iterator[IO[bytes]]:
    """Write a result atomically to the path that a user named.

    Symbolic links are followed. Devices and pipes are written to directly. Partial files that
    killed processes left of it are removed. Without `overwrite`, a file created at the path
    meanwhile is kept: the result gets another name in the same folder, which OutputExistsError
    reports.
    """
    if is_device(path):
        with path.open("wb") as file:
            yield file
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    remove_abandoned(path)
    with ExitStack() as held, replacing(path, None if overwrite else _publish_new) as file:
        held.enter_context(in_use(Path(file.name)))  # until it is renamed
        yield file


def write_output(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a small text as UTF-8, as `writing_output` does."""
    with writing_output(path, overwrite=overwrite) as file:
        file.write(text.encode())


def _publish_new(partial: Path, path: Path) -> None:
    """Rename a result without replacing another file. Raises OutputExistsError."""
    try:
        claim_name(partial, path)
    except FileExistsError:
        if path.is_file() and is_vacant(path):
            os.replace(partial, path)
            return
        kept = path.with_name(f"{path.stem}.{new_id()}{path.suffix}")
        os.replace(partial, kept)
        raise OutputExistsError(
            f"{path} was created by another process while this command ran, and is kept; the "
            f"result is {kept}"
        ) from None


def require_distinct(**outputs: str | Path | None) -> None:
    """Raises OutputExistsError if two outputs are the same file."""
    seen: dict[str, str] = {}
    for name, out in outputs.items():
        if out is None or is_stream(out):
            continue
        place = os.path.realpath(out)
        if place in seen:
            raise OutputExistsError(
                f"`{seen[place]}` and `{name}` are the same file, {out}; choose another `{name}`"
            )
        seen[place] = name


def require_apart(out: Path, inputs: Iterable[str | Path | None], option: str = "`out`") -> None:
    """Raises OutputExistsError if an output is, is within, or contains an input."""
    place = Path(os.path.realpath(out))
    for given in inputs:
        for found in _files_of(given):
            if _is_same(out, found):
                how = "is"
            elif found.is_dir() and place.is_relative_to(os.path.realpath(found)):
                how = "is within"
            elif out.is_dir() and Path(os.path.realpath(found)).is_relative_to(place):
                how = "contains"
            else:
                continue
            raise OutputExistsError(
                f"{option} {out} {how} the input {found}; choose another {option}"
            )


def is_stream(out: str | Path) -> bool:
    """Whether an output is stdout, a device or a pipe, which cannot be replaced."""
    return str(out) == _STDOUT or is_device(Path(out))


def is_vacant(path: Path) -> bool:
    """Whether a path does not exist, or is an empty file or folder. Raises OSError."""
    try:
        return not any(path.iterdir()) if path.is_dir() else path.stat().st_size == 0
    except FileNotFoundError:
        return True


def json_object_with(*keys: str) -> Recognizes:
    """Recognizes a file that is one JSON object with at least these keys."""

    def recognizes(path: Path) -> bool:
        fields = read_object(path)
        return fields is not None and fields.keys() >= set(keys)

    return recognizes


def json_lines_with(**kinds: type) -> Recognizes:
    """Recognizes a file of JSON objects, the first and last of which have these keys."""

    def recognizes(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                first = file.readline(_TAIL_BYTES)
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                last = file.read().splitlines()[-1]
        except (OSError, IndexError):
            return False
        return all(_has(_parsed(line), kinds) for line in (first, last))

    return recognizes


def file_with_mark(mark: bytes) -> Recognizes:
    """Recognizes a file by a mark near its beginning."""

    def recognizes(path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return mark in file.read(_HEAD_BYTES)
        except OSError:
            return False

    return recognizes


is_our_picture = file_with_mark(b"Software\0" + MAKER.encode())
"""A PNG that `data_pipeline.common.figures` wrote."""


def read_object(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None for anything else."""
    try:
        return _parsed(read_file(path, _MAX_OBJECT_BYTES))
    except OSError:
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _has(fields: Mapping[str, Any] | None, kinds: Mapping[str, type]) -> bool:
    return fields is not None and all(
        isinstance(fields.get(key), kind) for key, kind in kinds.items()
    )


def _files_of(given: str | Path | None) -> Iterator[Path]:
    """Existing local files and folders that an input names."""
    if given is None or str(given) in ("", _STDOUT):
        return
    path = given if isinstance(given, Path) else local_path(given)
    if path is None:
        return
    if path.exists():
        yield path
    else:  # Path.glob rejects absolute patterns
        yield from map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207


def _is_same(left: Path, right: Path) -> bool:
    """Whether two paths are the same file, by name or as hard links."""
    try:
        return left.samefile(right)
    except OSError:
        return os.path.realpath(left) == os.path.realpath(right)
