"""Offline English text: the documentation of this Python installation.

One document is the prose of one module's docstrings, or one topic of `pydoc_data`. Packages are
read as text, never imported. Paragraphs that are not sentences (tables, parameter types, markup,
code) are skipped. A paragraph is kept once per slice.
"""

import functools
import hashlib
import importlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipeline.errors import SourceEmptyError, SourceUnreadableError
from data_pipeline.sources.documents import Document, Slice, require_stamp

_SLICE_BYTES = 4 << 20
_MAX_FILE_BYTES = 2 << 20
_MIN_ENTRY_CHARACTERS = 80
_MIN_DOCUMENT_CHARACTERS = 400
_MIN_SENTENCE_WORDS = 6
_MAX_ODD_CHARACTERS = 0.05
_MIN_PLAIN_WORDS = 0.8

# Tests and vendored copies repeat other documentation; topics are imported.
_SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "site-packages"),
    *("_vendor", "lib2to3", "pydoc_data"),
    *("test", "testing", "tests"),
}

# Parsing 190 MB of packages takes 36 s, this expression 1 s. Files with unpaired quotes are
# skipped, and other strings are kept only if they are prose.
_STRING_OR_NAME = re.compile(
    r'"""(?P<text>.*?)"""|^(?P<margin>[ \t]*)(?:class|(?:async )?def) +(?P<name>\w+)',
    re.DOTALL | re.MULTILINE,
)
_BLOCK_START = re.compile(r"[-*+] |\d+[.)] |:\w+|\.\. |[\w*]+ ?(?:\([^)]*\))? ?: ")
_LABEL = re.compile(
    r"[*\w.`, ]{1,40}(?:\([^)]*\))? *(?::|--) +(?=[A-Z])"  # `name (type): Description.`
    r"|:(?:\w+ )+\w+: +"  # `:param name: description`
    r"|(?:[-*+]|\d+[.)]) +"  # list items
    r"|\.\. (?:note|warning|tip|important|seealso)::\s+"
)
# Repetitions are bounded: a docstring of brackets took quadratic time.
_CODE = re.compile(r">>>|\.\. |::\s|::$|https?:|==|->|[{}\\|@^~<>$]|^[#%]|---|_\w{0,200}\(|\w=\w")
_ROLE = re.compile(r":[a-z][\w:+-]{0,200}:`[~!]?([^`<]*?)(?: *<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?) *<[^`>]*>`__?|(?<!\w)\[`?([^\]`]{1,500})`?\](?:\([^)]{0,500}\))?_?")
_SENTENCES = re.compile(r"[A-Z\"'(\d*].*[\w)\"'%][.!?:][)\"']?")
_ODD_CHARACTER = re.compile(r"[^A-Za-z\s,.;:'\"()\-!?]")
_PLAIN_WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:['-][A-Za-z]+)*[\"').,;:!?]*")


def list_pydocs_slices() -> tuple[Slice, ...]:
    """Slices of the topics, and of all modules, of about 4 MiB of source each.

    Raises SourceEmptyError when this Python has no readable library, SourceUnreadableError when
    files are deleted during listing.
    """
    slices = []
    topics = _topics()
    if topics:
        size_bytes = sum(len(text.encode()) for text in topics.values())
        slices.append(
            Slice(
                kind="pydocs",
                path="topics",
                start=0,
                stop=len(topics),
                size_bytes=size_bytes,
                stamp=_topics_stamp(topics),
            )
        )
    files = _module_files()
    start = size_bytes = 0
    digest = hashlib.sha256()
    for index, (name, path) in enumerate(files):
        source = _read(path)
        size_bytes += len(source)
        _add(digest, name, source)
        if size_bytes >= _SLICE_BYTES or index == len(files) - 1:
            stamp = digest.hexdigest()
            slices.append(
                Slice(
                    kind="pydocs",
                    path="modules",
                    start=start,
                    stop=index + 1,
                    size_bytes=size_bytes,
                    stamp=stamp,
                )
            )
            start, size_bytes, digest = index + 1, 0, hashlib.sha256()
    if not slices:
        raise SourceEmptyError(
            "pydocs: this Python installation has no source files; name another source"
        )
    return tuple(slices)


def read_pydocs_slice(piece: Slice) -> Iterator[Document]:
    """Documents of one slice. Raises SourceUnreadableError when files changed since listing."""
    seen: set[str] = set()
    if piece.path == "topics":
        topics = _topics()
        require_stamp(piece, _topics_stamp(topics))
        for name in sorted(topics):
            yield from _document(f"pydoc topic {name}", [(name, topics[name])], seen)
        return
    documents: list[Document] = []
    digest = hashlib.sha256()
    size_bytes = 0
    for name, path in _module_files()[piece.start : piece.stop]:
        source = _read(path)
        _add(digest, name, source)
        if size_bytes >= _SLICE_BYTES:  # longer than any slice: it was not listed here
            break
        size_bytes += len(source)
        documents.extend(_document(name, _entries(name, source), seen))
    require_stamp(piece, digest.hexdigest())
    yield from documents


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except ImportError:  # some distributions omit it
        return {}


def _topics_stamp(topics: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(topics.items())).encode()).hexdigest()


@functools.cache
def _module_files() -> tuple[tuple[str, Path], ...]:
    """Dotted name and path of every module, the standard library first, in a fixed order.

    The installation is listed once per process: stamps of slices detect later changes.
    """
    paths = sysconfig.get_paths()
    roots = dict.fromkeys(Path(paths[key]).resolve() for key in ("stdlib", "purelib", "platlib"))
    files: list[tuple[str, Path]] = []
    for root in roots:
        below: list[tuple[str, Path]] = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            for name in names:
                path = Path(folder, name)
                if path.suffix != ".py" or not path.is_file():  # an editor's dangling lock
                    continue
                if path.stat().st_size <= _MAX_FILE_BYTES:
                    parts = path.relative_to(root).with_suffix("").parts
                    dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                    below.append((dotted, path))
        files.extend(sorted(below))
    return tuple(files)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceUnreadableError(
            f"pydocs: cannot read {path}: {error.strerror}; run the command again"
        ) from None


def _add(digest: "hashlib._Hash", name: str, source: bytes) -> None:
    digest.update(f"{name}:{len(source)}:".encode())
    digest.update(source)


def _entries(module: str, source: bytes) -> Iterator[tuple[str, str]]:
    """Heading and raw text of each docstring of a module, in source order."""
    num_quotes = source.count(b'"""')
    if num_quotes == 0 or num_quotes % 2:
        return
    try:
        code = source.decode()
    except UnicodeDecodeError:  # an old file in another encoding
        return
    scopes: list[tuple[int, str]] = []
    for match in _STRING_OR_NAME.finditer(code):
        name = match["name"]
        line_start = match.start() if name else code.rfind("\n", 0, match.start()) + 1
        line = code[line_start : match.end()]
        margin = len(line) - len(line.lstrip())
        while scopes and scopes[-1][0] >= margin:
            scopes.pop()
        if name:
            scopes.append((margin, name))
        elif len(match["text"]) >= _MIN_ENTRY_CHARACTERS:
            yield ".".join(scope for _, scope in scopes) or module, match["text"]


def _document(name: str, entries: Iterable[tuple[str, str]], seen: set[str]) -> Iterator[Document]:
    """Document of a module or topic, if its prose is long enough; adds to `seen`."""
    parts = []
    for heading, raw in entries:
        fresh = dict.fromkeys(text for text in _paragraphs(raw) if text not in seen)
        text = "\n".join(fresh)
        if len(text) >= _MIN_ENTRY_CHARACTERS:
            seen.update(fresh)
            parts.append(f"{heading}\n{text}")
    text = "\n\n".join(parts)
    if len(text) >= _MIN_DOCUMENT_CHARACTERS:
        yield Document(text, name)


def _paragraphs(raw: str) -> Iterator[str]:
    """Paragraphs of a docstring that are sentences, each on one line."""
    for block in _blocks(raw.replace("\\\n", "\n")):
        label = _LABEL.match(block)
        text = block[label.end() :] if label else block
        text = _LINK.sub(lambda link: link[1] or link[2], _ROLE.sub(r"\1", text))
        text = text.replace("`", "").replace("**", "")
        words = text.split()
        if len(words) < _MIN_SENTENCE_WORDS or _CODE.search(text) or not _SENTENCES.fullmatch(text):
            continue
        num_plain = sum(1 for word in words if _PLAIN_WORD.fullmatch(word))
        num_odd = len(_ODD_CHARACTER.findall(text))
        if num_plain >= _MIN_PLAIN_WORDS * len(words) and num_odd <= _MAX_ODD_CHARACTERS * len(
            text
        ):
            yield text


def _blocks(raw: str) -> Iterator[str]:
    """Joined lines of each block; blank lines, margins and list markers separate blocks."""
    block: list[str] = []
    margin = 0
    for line in inspect.cleandoc(raw).splitlines():
        words = line.split()
        indent = len(line) - len(line.lstrip())
        if block and (not words or indent != margin or _BLOCK_START.match(line, indent)):
            yield " ".join(block)
            block = []
        margin = indent
        block.extend(words)
    if block:
        yield " ".join(block)
