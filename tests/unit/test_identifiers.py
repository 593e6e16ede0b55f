"""Names in product code are the field's words in American spelling, one for each thing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIELD_WORDS = {
    "most": "max",
    "least": "min",
    "fewest": "min",
    "learnt": "learned, or what it is: loss",
    "told": "reported",
    "tell": "report",
    "say": "log, or echo",
    "said": "message",
    "artefact": "artifact",
    "judgement": "the scores or the state that it is",
    "mirror": "tracker",
    "pulse": "watchdog",
    "sampler": "decoder",
    "colour": "color",
    "neighbour": "neighbor",
    "behaviour": "behavior",
    "favour": "favor",
    "centre": "center",
    "licence": "license",
    "modelled": "modeled",
    "labelled": "labeled",
    "mend": "fix",
}
BRITISH = re.compile(r"\w{2,}(?:is(?:e[ds]?|ing|ation)|yse[ds]?)")
ISE = {"raise", "raises", "raised", "raising", "otherwise", "noise", "promise", "promised"}
ISE |= {"reraise", "wise", "pairwise", "elementwise", "wordwise", "precise", "advise", "advised"}
OF_OTHERS = {"most_common", "tell"}  # methods of Counter and of files
SOURCES = [
    path
    for folder in ("data_pipeline", "launcher", "megaback", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def defined_names(source: str) -> set[str]:
    """Names that some code defines: classes, functions, arguments, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.AsyncFunctionDef(name=name) | ast.arg(arg=name) | ast.alias(asname=str(name)):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def words_of(name: str) -> list[str]:
    """Lowercase words of a name: `_maxTokens_BT` is max, tokens, b, t."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def problem_of(name: str) -> str | None:
    """The problem with a name, or None."""
    if name in OF_OTHERS:
        return None
    for word in words_of(name):
        if field_word := FIELD_WORDS.get(word) or FIELD_WORDS.get(word.removesuffix("s")):
            return f"{name}: not {word!r}, but {field_word}"
        if BRITISH.fullmatch(word) and word not in ISE:
            return f"{name}: {word!r} is spelled with a z"
    return None


@pytest.mark.parametrize(
    "name", ["most_tokens", "LEAST_BYTES", "toldTokens", "Mirrors", "GRID_COLOUR", "_normalised"]
)
def test_a_private_word_is_found(name: str) -> None:
    assert problem_of(name) is not None


def test_identifiers_contain_no_private_words() -> None:
    problems = {
        f"{path.relative_to(ROOT)}: {problem}"
        for path in SOURCES
        for name in defined_names(path.read_text())
        if (problem := problem_of(name)) is not None
    }

    assert not problems
