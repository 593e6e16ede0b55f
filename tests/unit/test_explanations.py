"""Fields have docstrings that begin with a noun and name the unit."""

import ast
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megaback.cli import main as megaback_command
from megaback.config_section import Section
from tests.helpers.commands import COMMANDS, COMMANDS_OF_MEGABACK
from tests.helpers.paths import ROOT
from tests.helpers.product import MODULES

NO_NOUN_IN_CONFIG = re.compile(
    "an?|at|besides|by|from|how|if|in|its?|of|on|that|the|this|to|until|what|when|where|whether|"
    "which|who|whose|with|end|refuse|skip|write"
)
NO_NOUN = re.compile("of|that|by")
NO_NOUN_IN_FIELD = re.compile(
    "of|that|by|at|below|besides|from|for|how|in|its|on|or|their|to|until|what|when|where|which|who|"
    "whose|with"
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
    """Definitions in a module, with the docstring of each field, class and function."""
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
    parts = ("", "_batch", "_data", "_finetune", "_operation", "_validation")
    names = [f"config{part}.py" for part in parts]
    trees = [ast.parse((ROOT / "megaback" / name).read_text(encoding="utf-8")) for name in names]
    return {
        f"{section.name}.{field.target.id}": text
        for tree in trees
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


def test_no_docstring_begins_without_its_noun() -> None:
    """`Of the peak` has no head word in an editor's tooltip."""
    wrong = {
        f"{module}:{defined.lineno}": text
        for module, path in MODULES.items()
        for defined, text in explained(ast.parse(path.read_text(encoding="utf-8")))
        if text is not None
        and (
            NO_NOUN_IN_FIELD if isinstance(defined, ast.Assign | ast.AnnAssign) else NO_NOUN
        ).fullmatch(first_word(text))
    }
    assert wrong == {}


def test_the_fields_found_by_their_text_are_those_of_the_config() -> None:
    assert config_fields().keys() == {
        f"{section.__name__}.{name}"
        for section in [*Section.__subclasses__(), Section]
        for name in section.model_fields
    }


OPTION_UNITS = {
    "bytes": r"\bbytes\b",
    "characters": r"in characters",
    "documents": r"documents\b",
    "gb": r"GB",
    "gbits": r"Gbit/s",
    "rows": r"\brows\b",
    "seconds": r"\bseconds\b",
    "steps": r"\bsteps\b",
    "tokens": r"\btokens\b",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_is_explained(name: str) -> None:
    command = COMMANDS[name]
    context = click.Context(command)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = re.findall(r"[A-Z_]{2,}", parameter.make_metavar(context))[0]
            assert re.search(rf"\b{word}\b", command.help or ""), parameter.name
        elif isinstance(parameter, click.Option) and not parameter.hidden:
            text = parameter.help or ""
            assert re.fullmatch(r"(data: |convert: )?[A-Za-z].{8,}(\.|\$)", text), parameter.opts
            unit = OPTION_UNITS.get(parameter.opts[0].rpartition("-")[2])
            assert unit is None or re.search(unit, text), parameter.opts
            default = parameter.get_default(context)
            has_default = isinstance(default, str | float | Path) and default != ""
            has_default = has_default or (isinstance(default, int) and default is not False)
            assert parameter.show_default or not has_default, parameter.opts


@pytest.mark.parametrize("name", COMMANDS)
def test_h_is_short_for_help(name: str) -> None:
    is_ours = name in COMMANDS_OF_MEGABACK
    command, words = (megaback_command, name.split()) if is_ours else (COMMANDS[name], [])

    short, long = (CliRunner().invoke(command, [*words, word]) for word in ("-h", "--help"))

    assert (short.exit_code, short.output) == (0, long.output)
    assert "-h, --help" in short.output
