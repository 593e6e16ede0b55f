"""Unit tests mirror the layout of the product."""

import ast
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.product import PACKAGES

UNIT = ROOT / "tests" / "unit"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def misplaced(tests: list[Path]) -> list[str]:
    """Unit tests in a folder that the product does not have."""
    return [
        path.relative_to(UNIT).as_posix()
        for path in tests
        if path.parent != UNIT and not (ROOT / path.parent.relative_to(UNIT)).is_dir()
    ]


def test_folders_of_unit_tests_are_those_of_the_product() -> None:
    assert {path.relative_to(UNIT).parts[0] for path in UNIT.rglob("*/test_*.py")} == {*PACKAGES}
    assert misplaced(sorted(UNIT.rglob("test_*.py"))) == []
    assert misplaced([UNIT / "megaback" / "modle" / "test_gpt.py"]) == [
        "megaback/modle/test_gpt.py"
    ]


def test_shared_test_code_is_in_the_helpers_package() -> None:
    """No test module imports another, as its tests would run twice."""
    imported = [
        (path.relative_to(ROOT).as_posix(), node.module)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module
        and (node.module.rpartition(".")[2].startswith("test_") or node.module == "conftest")
    ]
    assert imported == []


def test_every_folder_of_the_product_has_unit_tests() -> None:
    folders = {
        path.parent.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    tested = {path.parent.relative_to(UNIT) for path in UNIT.rglob("*/test_*.py")}
    assert sorted(map(str, folders - tested)) == []
