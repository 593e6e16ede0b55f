"""Options of one meaning have one name in all commands, and one declaration."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

import click
import pytest

from tests.helpers.commands import COMMANDS
from tests.helpers.product import MODULES

OTHER_SPELLINGS = {
    "--batch-size": ["--at-once", "--texts-at-once", "--rows-at-once"],
    "--compression-level": ["--level"],
    "--device": ["--cuda", "--gpu"],
    "--dtype": ["--data-type", "--torch-dtype"],
    "--in": ["--infile", "--input", "--input-file"],
    "--json": ["--as-json", "--jsonl"],
    "--limit": ["--documents", "--examples", "--max-documents", "--max-rows", "--max-texts"],
    "--max-new-tokens": ["--length", "--max-length", "--max-tokens", "--new-tokens", "--tokens"],
    "--max-requeues": ["--requeue-limit"],
    "--min-new-tokens": ["--min-tokens"],
    "--num-samples": ["--k", "--n", "--num-return-sequences", "--samples"],
    "--num-seeds": ["--seeds"],
    "--out": ["--outfile", "--output", "--output-dir", "--output-file"],
    "--plot": ["--figure", "--picture"],
    "--seed": ["--random-seed", "--sampling-seed"],
    "--temperature": ["--sampling-temperature"],
    "--training-tokens": ["--train-tokens", "--total-tokens"],
    "--workers": ["--jobs", "--num-workers", "--processes", "--threads"],
}
SHARED = [
    *("--dtype", "--html", "--hostfile", "--limit", "--max-new-tokens"),
    *("--max-record-bytes", "--min-p", "--num-samples", "--on-bad-record", "--save-before"),
    *("--seed", "--temperature", "--text-column", "--top-k", "--top-p", "--workers"),
]
TYPES_THAT_DIFFER = {
    "--device": {"choice", "text"},  # `rehearse` has a type of device, others also `cuda:1`
    "--in": {"source", "path"},  # `rerank` and `score` read one file, or standard input
    "--task-index": {"integer range", "text"},  # `shards build` also does a range of tasks
    "--text": {"filename"},
}


def options() -> Iterator[tuple[str, click.Option]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                yield name, parameter


@cache
def declarations() -> list[tuple[str, str, str]]:
    """Option, module and help of each `click.option` in the code, except hidden ones."""
    found = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "click.option"):
                continue
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            for word in node.args:
                if isinstance(word, ast.Constant) and "hidden" not in keywords:
                    found.append((str(word.value), module, keywords.get("help", "")))
    return found


def test_no_option_has_another_spelling() -> None:
    wanted = {other: name for name, others in OTHER_SPELLINGS.items() for other in others}
    wrong = {
        f"{command} {name}": f"call it {wanted[name]}"
        for command, option in options()
        for name in (*option.opts, *option.secondary_opts)
        if name in wanted
    }
    assert wrong == {}


def test_limits_are_named_max_and_min() -> None:
    names = {name for _, option in options() for name in option.opts if name.startswith("--")}
    assert len(names) > 100
    assert not [
        name for name in names if set(name.split("-")) & {"most", "least", "maximum", "minimum"}
    ]
    assert not [name for name in names if name.endswith("-limit") and name != "--limit"]


def test_a_meaning_has_one_name() -> None:
    names = defaultdict(set)
    for _, option in options():
        names[option.help].add(max(option.opts, key=len))
    assert {text: found for text, found in names.items() if len(found) > 1} == {}


def test_a_name_takes_one_type_of_value() -> None:
    kinds = defaultdict(set)
    for _, option in options():
        is_path = isinstance(option.type, click.Path)
        kinds[max(option.opts, key=len)].add("path" if is_path else option.type.name)
    found = {name: of_name for name, of_name in kinds.items() if len(of_name) > 1}
    assert {name: of for name, of in found.items() if of != TYPES_THAT_DIFFER.get(name)} == {}


def test_an_option_with_the_same_help_is_declared_once() -> None:
    modules = defaultdict(list)
    for name, module, text in declarations():
        if name.startswith("-"):
            modules[name, text].append(module)
    assert len(modules) > 100
    assert {option: found for option, found in modules.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_option_is_declared_in_one_module(name: str) -> None:
    assert len({module for option, module, _ in declarations() if option == name}) == 1
