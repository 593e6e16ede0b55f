"""Reference of the Python API: what is in `megaback.__all__`, as it is written in the source."""

import ast
import re
from collections.abc import Iterator

import megaback
from docs.generate.markdown import code, prose, table
from megaback import errors
from megaback import source_definitions as source

_BEGINNING = """\
# Python API

What `import megaback` has: functions, classes, and the errors that are raised.
[From Python](../python.md) shows how to use them.

"""
_SHOWN_DUNDERS = ("__len__", "__iter__")
INTERNAL = {
    *("Chat.model", "Chat.decoder", "Chat.form"),
    *("Infiller.read", "Infiller.meet_steps", "Scorer.score_all"),
}
"""Members that commands and the server use; their types are not part of the API."""


def page() -> str:
    names = sorted(megaback.__all__, key=lambda name: (not name.islower(), name))
    parts = [_BEGINNING]
    parts += [part for name in names if name != "errors" for part in _described(name)]
    return "".join([*parts, *_errors()]).rstrip() + "\n"


def _described(name: str) -> Iterator[str]:
    module = megaback._MODULES[name]
    node = source.definition(module, name)
    if isinstance(node, ast.FunctionDef):
        yield f"## {name}\n" + _function(module, node)
        return
    yield f"## {name}\n{_docstring(source.docstring(node))}"
    yield table(
        ["field", "type", "default", "description"],
        (
            [code(field), code(kind), code(default), prose(text)]
            for field, kind, default, text in source.fields(module, node)
            if f"{name}.{field}" not in INTERNAL
        ),
    )
    methods = [
        one
        for one in node.body
        if isinstance(one, ast.FunctionDef)
        and (not one.name.startswith("_") or one.name in _SHOWN_DUNDERS)
        and f"{name}.{one.name}" not in INTERNAL
    ]
    properties = [one for one in methods if "property" in map(ast.unparse, one.decorator_list)]
    yield table(
        ["property", "type", "description"],
        (
            [
                code(one.name),
                code(source.written(module, one.returns)),
                prose(source.docstring(one)),
            ]
            for one in properties
        ),
    )
    for method in methods:
        if method not in properties:
            yield f"### {code(f'{name}.{method.name}')}\n" + _function(module, method)


def _function(module: str, node: ast.FunctionDef) -> str:
    signature = source.signature(module, node)
    return f"```python\n{signature} ...\n```\n{_docstring(source.docstring(node))}"


def _docstring(text: str) -> str:
    """Paragraphs; the entries below `Args:` and `Raises:` become lists."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text) if text else []:
        head, _, entries = paragraph.partition("\n")
        if head in ("Args:", "Raises:"):
            found = re.split(r"\n    (?=\S)", f"\n{entries}")[1:]
            pairs = [entry.partition(": ") for entry in found]
            parts += [
                head + "\n",
                "".join(f"- {_names(names)}: {prose(said)}\n" for names, _, said in pairs),
            ]
        else:
            parts += [prose(paragraph) + "\n"]
    return "\n".join(parts) + "\n"


def _names(names: str) -> str:
    return ", ".join(code(name) for name in names.split(", "))


def _errors() -> Iterator[str]:
    """The module of errors, whose classes have a base and an exit code each."""
    yield "## errors\n" + prose((errors.__doc__ or "").partition("\n\n")[0]) + "\n\n"
    found = [
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.MegabackError)
    ]
    rows = (
        [
            code(one.__name__),
            code(one.__bases__[0].__name__),
            str(one.exit_code),
            prose(one.__doc__ or ""),
        ]
        for one in sorted(found, key=lambda one: (one.exit_code, one.__name__))
    )
    yield table(["error", "base", "[exit code](../exit_codes.md)", "description"], rows)
