"""Lint of prose: phrases that are not the English of the field, in code, help, docs and tests.

`python -m tests.helpers.words [PATH ...]` prints each use and exits with 1 if there is one; without
a path it reads every tracked file. Checked in Python are docstrings, comments, the names of tests
and, outside tests, every string; in other files, all lines. Strings that implicit concatenation
joins, and comments on consecutive lines, are read as one text.
"""

import io
import re
import subprocess
import sys
import token
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tests.helpers.paths import ROOT

_PER = (
    "token|step|rank|row|second|minute|hour|line|GPU|node|file|device|shard|document|lane|layer|"
    "byte|character|sample|process|worker|day|request|head|command|core|CPU|parameter|matrix|"
    "tensor|record|pair|frame|candidate|question|example|prompt|folder|module|choice"
)
_COUNTED = (
    r"nats?|bits?|tokens?|bytes?|lines?|rows?|ids|seconds?|ms|s|[kMGT]i?B|[kM]?tok|FLOPs?|steps?|"
    r"ranks?|shards?|files?|frames?|processes|threads?|workers?|requests?|samples?|once|twice|one"
)
# What to write in its place: a regular expression and the words of the field.
BANNED = {
    rf"\b({_COUNTED}|\d+(\.\d+)?) an? ({_PER})\b": "per",
    r"\bso many\b": "N, or the number",
    r"\b(goes|go|gone|going|went) on\b": "resume, continue, or happen",
    r"\bno numbers?\b(?! of)": "non-finite",
    r"\b(un)?mend(s|ed|ing)?\b": "fix",
    r"\b(told|tells?|telling)\b": "report, log, name, distinguish",
    r"\blet(s|ting)? ((it|them|\w+) )?go\b": "delete, close, release",
    r"\bin peace\b": "uninterrupted",
    r"\blearnt\b": "learned, or trained on",
    r"\bsa(y|ys|id) so\b": "report it",
    r"\banew\b": "again",
    r"\boutliv(e|es|ed|ing)\b": "survive",
    r"\bgets? nowhere\b": "make no progress",
    r"\bby nobody\b": "not",
    r"\b(without a|not a|a clear) word\b": "silently, or an error",
    r"\bwhat (comes|came) (of|in|from|after|before)\b": "the noun that it is",
    r"\b(stands?|stood) (in|at|there|behind|beside|between|on|first|last|alone|twice)\b": "is",
    r"\b(lies|lay|lie) (in|at|there|behind|beside|between|on|under|below|before|where)\b": "is",
    r"\b(leaves?|leaving|left) out\b": "exclude, skip, omit",
    r"\b(pass|passes|passed|passing) over\b(?! (the (data|train|val)|halves|each))": "skip",
    r"\b(ends?|ended|fails?|failed|refused|refuses|stops|stopped|answers?|answered) (with|by|in) "
    r"(a|one|its) (\w+ )?sentence\b": "error message",
    r"\bstrangers?('s)?\b": "untrusted, third-party, unknown",
    r"\bin vain\b": "without effect",
    r"\b(is|are|was|were) to be\b": "must, should, will be",
    r"\b(not|nothing) to be\b": "cannot be, must not be",
    r"\bcut short\b": "truncated, interrupted",
    r"\bhalf[- ]written\b": "partial",
    r"\b(hence|thereby|therein|thereof|whence|thither|hither|henceforth|thereupon)\b": "so",
    r"\b(anybody|somebody|nobody)('s)?\b": "who it is, another process, no one",
    r"\bgiven? back\b|\bgives? back\b": "return",
    r"\b(artefact|behaviour|colour|favour|flavour|honour|neighbour|labour|rumour|vigour)(\w*)\b": (
        "American spelling"
    ),
    r"\b(centre[ds]?|licences?|judgements?|modell\w+|labell\w+|(?-i:[Cc]ancell(ed|ing))|travell\w+|grey|"
    r"whilst|catalogues?|defence|offence|analyse[ds]?|analysing|spelt|burnt|dreamt)\b": (
        "American spelling"
    ),
    r"\b(optim|normal|initial|serial|summar|recogn|token|organ|synchron|vector|quant|util|minim|"
    r"maxim|priorit|real|special|general|parallel|character|penal|custom|final|local|visual|capital|"
    r"standard|emphas|stabil|random|factor|memor|author)is(e|es|ed|ing|ation|ations|er|ers)\b": (
        "American spelling"
    ),
}
# How a docstring does not begin: with a clause where its noun or verb is missing.
BANNED_STARTS = {
    r"(Of|What|How|Where|When|Which|Those|Say|Says|Tell)\b": "the noun or the verb first",
}
_PATTERNS = [
    (re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), words)
    for pattern, words in BANNED.items()
]
_STARTS = [(re.compile(pattern), words) for pattern, words in BANNED_STARTS.items()]
_ENDINGS = {
    ".py",
    ".md",
    ".sh",
    ".sbatch",
    ".yaml",
    ".yml",
    ".toml",
    ".cff",
    ".def",
    ".js",
    ".html",
}
_NAMES = {"Makefile", "Dockerfile", "run"}
# Words that are there to be refused, recorded text, and the text that models are tried on.
_EXCLUDED = (
    "tests/helpers/words.py",
    "tests/unit/test_words.py",
    "tests/unit/test_identifiers.py",
    "tests/fuzz/corpus",
    "LICENSE",
)


def is_checked(path: Path) -> bool:
    """Whether a tracked file, relative to the root, holds prose."""
    is_prose = path.suffix in _ENDINGS or path.name in _NAMES
    return is_prose and not path.as_posix().startswith(_EXCLUDED)


def problems_of(path: Path, text: str) -> Iterator[str]:
    """Each banned phrase of a file with its line."""
    texts = _prose_of_python(text, path) if path.suffix == ".py" else [(1, text, False)]
    for first_line, prose, is_docstring in texts:
        flat = _flat(prose)
        found = [(m, words) for pattern, words in _PATTERNS for m in pattern.finditer(flat)]
        if is_docstring:
            found += [(m, words) for pattern, words in _STARTS if (m := pattern.match(prose))]
        for match, words in found:
            line = first_line + prose.count("\n", 0, match.start())
            yield f"{path}:{line}: {' '.join(match[0].split())!r}: {words}"


def _flat(text: str) -> str:
    """The text with its line breaks, and what continues a comment or list, as spaces."""
    return re.sub(r"\n[ \t]*#?", lambda m: " " * len(m[0]), text)


def _prose_of_python(source: str, path: Path) -> Iterator[tuple[int, str, bool]]:
    """(first line, text, is a docstring) of each piece of prose."""
    are_strings_checked = path.parts[0] != "tests"
    pieces: list[tuple[int, str]] = []
    kind = -1
    before = token.NEWLINE
    previous = ""
    for item in tokenize.generate_tokens(io.StringIO(source).readline):
        if item.type == token.STRING:
            is_docstring = before in (token.NEWLINE, token.INDENT, token.DEDENT, token.ENCODING)
            body = re.sub(r"^\w*('''|\"\"\"|'|\")|('''|\"\"\"|'|\")$", "", item.string)
            if is_docstring:
                yield item.start[0], body, True
            elif are_strings_checked:
                if kind != token.STRING:
                    yield from _joined(pieces)
                    pieces = []
                pieces.append((item.start[0], body))
                kind = token.STRING
            before = token.STRING
            continue
        if item.type == token.COMMENT:
            if kind != token.COMMENT:
                yield from _joined(pieces)
                pieces = []
            pieces.append((item.start[0], item.string.lstrip("#")))
            kind = token.COMMENT
            continue
        if item.type == token.NL:
            continue
        if item.type == token.NAME and previous == "def" and item.string.startswith("test_"):
            yield item.start[0], item.string.replace("_", " "), False
        yield from _joined(pieces)
        pieces, kind = [], -1
        before, previous = item.type, item.string
    yield from _joined(pieces)


def _joined(pieces: list[tuple[int, str]]) -> Iterator[tuple[int, str, bool]]:
    """Consecutive comments or strings as one text, with as many line breaks as between them."""
    if pieces:
        text = pieces[0][1]
        for (before, _), (line, more) in pairwise(pieces):
            text += "\n" * (line - before) + more
        yield pieces[0][0], text, False


def tracked_files() -> list[Path]:
    """Files of the project that hold prose, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [path for path in map(Path, listed.stdout.splitlines()) if is_checked(path)]


def main(paths: list[str]) -> int:
    """Print the problems of the named files and folders, or of all; 1 if there are any."""
    wanted = tuple(path.rstrip("/") for path in paths)
    problems = [
        problem
        for path in tracked_files()
        if not wanted or any(path.is_relative_to(one) for one in wanted)
        for problem in problems_of(path, (ROOT / path).read_text())
    ]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
