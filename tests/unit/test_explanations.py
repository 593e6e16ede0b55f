"""Fields are explained by a noun, with its unit."""

import ast
import re

import pytest

from megaback.config import Section
from tests.helpers.paths import ROOT

NO_NOUN_IN_CONFIG = re.compile(
    "an?|at|besides|by|from|how|if|in|its?|of|on|that|the|this|to|until|what|when|where|whether|"
    "which|who|whose|with|end|refuse|skip|write"
)
UNITS = {
    "bytes": r"bytes",
    "flops": r"FLOP/s",
    "frames": r"\bframes\b",
    "gb": r"gigabytes",
    "layers": r"\bblocks\b",
    "nats": r"nats per token",
    "rows": r"\brows\b",
    "s": r"in seconds",
    "steps": r"\bsteps\b",
    "tokens": r"in tokens",
    "width": r"in channels",
}


def explained(tree: ast.AST) -> list[tuple[ast.stmt, str | None]]:
    """Statements that define something, and the string below each field, class or function."""
    found: list[tuple[ast.stmt, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((node, ast.get_docstring(node)))
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for field, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.Assign | ast.AnnAssign):
                text = below.value if isinstance(below, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found.append((field, " ".join(text.value.split())))
                else:
                    found.append((field, None))
    return found


def first_word(text: str) -> str:
    return re.split(r"\W", text.strip(), maxsplit=1)[0].lower()


def config_fields() -> dict[str, str | None]:
    tree = ast.parse((ROOT / "megaback/config.py").read_text(encoding="utf-8"))
    return {
        f"{section.name}.{field.target.id}": text
        for section in tree.body
        if isinstance(section, ast.ClassDef)
        for field, text in explained(ast.Module(section.body, []))
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


@pytest.mark.parametrize("name", config_fields())
def test_every_field_of_the_config_is_explained_by_a_noun_and_its_unit(name: str) -> None:
    text = config_fields()[name]

    assert text is not None
    assert not NO_NOUN_IN_CONFIG.fullmatch(first_word(text))
    assert text[0].isupper()
    assert text.endswith((".", "…"))
    unit = UNITS.get(name.rpartition(".")[2].rpartition("_")[2])
    assert unit is None or re.search(unit, text)


def test_the_fields_found_by_their_text_are_those_of_the_config() -> None:
    assert config_fields().keys() == {
        f"{section.__name__}.{name}"
        for section in [*Section.__subclasses__(), Section]
        for name in section.model_fields
    }
