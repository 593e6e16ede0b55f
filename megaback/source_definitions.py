"""Definitions as they are written in the source: signatures, fields and docstrings.

Texts are cut from the source. What `inspect` makes of them depends on the version of Python.
"""

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef


@cache
def _parsed(module: str) -> tuple[list[str], ast.Module]:
    """The lines of a module, and its tree."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def definition(module: str, name: str) -> Definition:
    """The class or function of a module. Raises LookupError."""
    for node in _parsed(module)[1].body:
        if isinstance(node, Definition) and node.name == name:
            return node
    raise LookupError(f"{module} does not define {name}")


def signature(module: str, node: ast.FunctionDef) -> str:
    """The lines from `def` to the colon."""
    lines = _parsed(module)[0][node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines))


def written(module: str, node: ast.expr | None) -> str:
    """The source of an expression, on one line; `ast.get_source_segment` would split it each time.

    Columns of the tree count bytes.
    """
    if node is None or node.end_lineno is None:
        return ""
    lines = [line.encode() for line in _parsed(module)[0][node.lineno - 1 : node.end_lineno]]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return " ".join(b" ".join(lines).decode().split())


def docstring(node: Definition) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def fields(module: str, node: Definition) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and explanation of each field of a class: the string below it."""
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            text = below.value if isinstance(below, ast.Expr) else None
            is_text = isinstance(text, ast.Constant) and isinstance(text.value, str)
            yield (
                written(module, field.target),
                written(module, field.annotation),
                written(module, field.value),
                ast.literal_eval(text) if text and is_text else "",
            )
