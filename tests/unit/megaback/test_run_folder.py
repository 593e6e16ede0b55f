"""Names of a run's files, defined in one module, and the checkpoints that a path means."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.text.tokenizer import TOKENIZER_NAME
from megaback import run_folder
from megaback.run_folder import checkpoints_meant_by, holds_weights, step_name, step_of

ROOT = Path(run_folder.__file__).parents[1]
NAMES = {value for name, value in vars(run_folder).items() if name.endswith(("_NAME", "_FOLDER"))}
NAMES.add(TOKENIZER_NAME)
PREFIXES = tuple(value for name, value in vars(run_folder).items() if name.endswith("_PREFIX"))
HOMES = {
    "megaback/run_folder.py",
    "data_pipeline/text/tokenizer.py",  # the tokenizer's name, which checkpoints share
    "data_pipeline/build/train_command.py",  # cannot import megaback, and looks for runs nearby
    "megaback/planning/host_memory.py",  # a controller of cgroups has the name of a folder
}


def names_in(source: str) -> Iterator[str]:
    """Names of a run's files in code: anywhere with a suffix, only in paths without one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith("megaback "):  # an example of a command line
                continue
            parts = node.value.split("/")
            if any("." in part[1:] and part in NAMES for part in parts) or (
                " " not in node.value and node.value.startswith(PREFIXES)
            ):
                yield node.value
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            operands = [node.right]
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "name" for side in sides):
                operands = [leaf for side in sides for leaf in getattr(side, "elts", [side])]
        for one in operands:
            if isinstance(one, ast.Constant) and one.value in NAMES:
                yield one.value


def test_no_other_module_repeats_the_name_of_a_run_s_file() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for package in ("data_pipeline", "megaback", "launcher", "tools")
        for path in (ROOT / package).rglob("*.py")
        for name in names_in(path.read_text(encoding="utf-8"))
    }
    assert {one for one in found if one[0] not in HOMES} == set()
    assert ("megaback/run_folder.py", "metrics.jsonl") in found
    assert ("data_pipeline/text/tokenizer.py", TOKENIZER_NAME) in found


@pytest.mark.parametrize(
    "code",
    [
        'run / "checkpoints"',
        'path.name == "best"',
        'path.name in ("latest", "other")',
        'open(f"{run}/metrics.jsonl")',
        'f"step-{step:08d}"',
    ],
)
def test_a_repeated_name_is_found_in_code(code: str) -> None:
    assert list(names_in(code)) != []
    assert list(names_in('fields["best"], "see step-1 of the latest", len("checkpoints")')) == []


def make_checkpoint(run: Path, step: int) -> Path:
    checkpoint = run / "checkpoints" / step_name(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text("{}")
    return checkpoint


def test_a_run_its_checkpoints_folder_a_mark_and_a_step_resolve_to_checkpoints(
    tmp_path: Path,
) -> None:
    first, second = make_checkpoint(tmp_path, 9), make_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / step_name(11)).mkdir()  # not complete
    best = tmp_path / "checkpoints" / "best"
    best.write_text(f"{first.name}\n")
    assert checkpoints_meant_by(tmp_path) == [first, second]
    assert checkpoints_meant_by(tmp_path / "checkpoints") == [first, second]
    assert checkpoints_meant_by(best) == checkpoints_meant_by(first) == [first]
    assert [step_of(one) for one in checkpoints_meant_by(tmp_path)] == [9, 10]
    assert all(map(holds_weights, (tmp_path, best, first)))


def test_an_empty_folder_and_another_file_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    assert checkpoints_meant_by(tmp_path) == []
    assert not holds_weights(tmp_path)
    assert not holds_weights(tmp_path / "notes")
