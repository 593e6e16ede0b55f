"""Validation of the paths in a data set card: a data set may only name its own files.

README.md and .huggingface.yaml are untrusted. The library `datasets` opens whatever they name under
`data_files` and `data_dir`: any local path, other repository or address. They are checked before
the library reads them, and the files that it found are checked before they are read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.file_names import leads_out
from data_pipeline.errors import SourceUnreadableError

CARDS = ("README.md", ".huggingface.yaml")
OTHER_FILES = ("dataset_infos.json",)
"""Files that the library also reads before any data."""

_MAX_CARD_BYTES = 4 << 20
"""Maximum size of a card; 2,000 configs are 1 MiB, and take the library half a minute."""
_MAX_NODES = 1 << 20
_KEYS = ("data_files", "data_dir")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def require_own_files(shown: str, read: Callable[[str, int], bytes | None]) -> None:
    """Raises SourceUnreadableError if a data set names files of others.

    `read` returns at most the given number of bytes of a file of the data set, or None if the file
    does not exist. Its errors are raised unchanged.
    """
    for name in (*CARDS, *OTHER_FILES):
        content = read(name, _MAX_CARD_BYTES + 1)
        if content is None:
            continue
        if len(content) > _MAX_CARD_BYTES:
            raise SourceUnreadableError(
                f"{shown}: its {name} is longer than {_MAX_CARD_BYTES:,} bytes; download the data "
                "set and name its files"
            )
        if name in CARDS:
            _require_own(content.decode("utf-8", "replace"), shown, name)


def read_card(folder: Path, name: str, num_bytes: int) -> bytes | None:
    """The first bytes of a file in a folder; None if it does not exist. Raises OSError."""
    path = folder / name
    if not path.is_file():
        if os.path.lexists(path):  # a pipe would block the library forever
            raise SourceUnreadableError(f"{path}: not a regular file; remove it, or replace it")
        return None
    with path.open("rb") as file:
        return file.read(num_bytes)


def require_within(addresses: Iterable[str], root: str, shown: str) -> None:
    """Raises SourceUnreadableError if files are outside the data set, with links resolved.

    `root`: folder of the data set, or its address on the hub.
    """
    for address in addresses:
        if "://" in root:
            is_own = address.startswith(f"{root}/") and ".." not in address.split("/")
        else:
            is_own = not leads_out(Path(address), Path(root))
        if not is_own:
            raise SourceUnreadableError(
                f"{shown}: its file {address} is outside the data set, or a link out of it; copy "
                "the file into the data set, or name it as a separate `source`"
            )


def _require_own(text: str, shown: str, name: str) -> None:
    first_line = 1
    if name == CARDS[0]:
        from huggingface_hub.repocard import REGEX_YAML_BLOCK  # the part that the library reads

        match = REGEX_YAML_BLOCK.search(text)
        if match is None:
            return
        first_line += text.count("\n", 0, match.start(2))
        text = match[2]
    try:
        root = yaml.compose(text, Loader=_LOADER)
        if root is not None and _num_nodes(root, {}) > _MAX_NODES:
            raise yaml.YAMLError("its aliases expand to too many values")
        found = [] if root is None else list(_named_files(root, set()))
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceUnreadableError(
            f"{shown}: the YAML of its {name} cannot be read ({reason}); fix it, or name the data "
            "files"
        ) from None
    for key, node in found:
        if not _is_own(node.value):
            line = first_line + node.start_mark.line
            raise SourceUnreadableError(
                f"{shown}: line {line} of its {name} names {node.value[:100]!r} under {key!r}, "
                "which is not a file of the data set; remove the line, or name the file as a "
                "separate `source`"
            )


def _is_own(path: str) -> bool:
    """Whether a relative path or pattern stays within its folder.

    >>> [_is_own(path) for path in ("data/*.parquet", "../a.txt", "file:/etc/passwd", "~/a.txt")]
    [True, False, False, False]
    """
    return (
        path.isprintable()
        and not path.startswith(("/", "\\", "~"))
        and "::" not in path
        and "://" not in path
        and _SCHEME.match(path) is None
        and ".." not in re.split(r"[/\\]", path)
    )


def _num_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values of a node, with aliases expanded."""
    if (found := known.get(id(node))) is not None:
        return found
    known[id(node)] = _MAX_NODES + 1  # for a node that contains itself
    known[id(node)] = 1 + sum(_num_nodes(child, known) for child in _children(node))
    return known[id(node)]


def _named_files(node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Key and node of each named path, at any depth."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in _KEYS:
                yield from ((key.value, scalar) for scalar in _scalars(value))
    for child in _children(node):
        yield from _named_files(child, seen)


def _scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.ScalarNode):
        yield node
    for child in _children(node):
        yield from _scalars(child)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
