"""Each folder imports only from the floors below it, within functions too."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.product import MODULES, PACKAGES

FLOORS = [
    ["data_pipeline.redaction"],
    ["data_pipeline.errors"],
    ["data_pipeline.common"],
    ["data_pipeline.text", "data_pipeline.storage"],
    ["data_pipeline.sources"],
    ["data_pipeline.shards"],
    ["data_pipeline.loading"],
    ["data_pipeline.build"],
    ["data_pipeline.tokenizer"],
    ["megaback.own_process", "megaback.source_definitions"],
    ["megaback.errors", "megaback.installation", "megaback.environment", "megaback.yaml_text"],
    ["megaback.run_folder", "megaback.yaml_edit"],
    ["megaback.copy_location"],
    ["megaback.config_messages", "megaback.config_section", "megaback.use_commands"],
    ["megaback.config_data", "megaback.config_finetune", "megaback.config_validation"],
    ["megaback.config_batch", "megaback.config_operation"],
    ["megaback.config"],
    ["megaback.branches", "megaback.origins"],
    ["megaback.branch_order", "megaback.horizons", "megaback.given_texts"],
    ["megaback.shown_config", "megaback.config_reference"],
    ["megaback.model", "megaback.planning"],
    ["megaback.open_shards", "megaback.optim"],
    ["megaback.data"],
    ["megaback.dataset_arguments"],
    ["megaback.dataset"],
    ["megaback.distributed"],
    ["megaback.faults"],
    ["megaback.checkpoints"],
    ["megaback.weights"],
    ["megaback.config_file"],
    ["megaback.inference", "megaback.tracking"],
    ["megaback.client"],
    ["megaback.scoring"],
    ["megaback.suites"],
    ["megaback.training"],
    ["megaback.rehearsal"],
    ["megaback.train"],
    ["megaback.profiling"],
    ["megaback.cli"],
    ["megaback.__main__"],
    ["launcher"],
    ["tools"],
]
FLOOR_OF = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}


def folder_of(module: str) -> str:
    """The folder, or the module beside the folders, that contains a full name."""
    parts = module.split(".")
    return parts[0] if parts[0] in FLOOR_OF else ".".join(parts[:2])


def imports_of(source: str) -> Iterator[str]:
    """Full names of our modules, and of names within them, that some code imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def wrong_imports(module: str, source: str) -> list[str]:
    """Imports of modules that are neither on a lower floor nor in the same folder."""
    mine = folder_of(module)
    wrong = []
    for name in imports_of(source):
        theirs = folder_of(name)
        if theirs == mine or (theirs not in FLOOR_OF and (name in PACKAGES or not is_module(name))):
            continue
        if FLOOR_OF[theirs] >= FLOOR_OF[mine]:
            wrong.append(f"{module} imports {name}")
    return wrong


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_every_module_has_a_floor() -> None:
    assert {folder_of(module) for module in MODULES} == set(FLOOR_OF)


def test_every_import_is_of_a_lower_floor() -> None:
    wrong = [
        line
        for module, path in MODULES.items()
        for line in wrong_imports(module, path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        "from data_pipeline.build.plan import Plan",
        "from data_pipeline.build import plan",
        "import megaback.config",
        "def late():\n    from data_pipeline.loading.order import Order",
    ],
)
def test_an_import_against_the_floors_is_found(source: str) -> None:
    assert len(wrong_imports("data_pipeline.shards.manifest", source)) == 1
    assert wrong_imports("tools.inspect_path", source) == []


def module_of(name: str) -> str:
    """The module that an imported name is, or is in; empty for a package."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def circle_of(sources: Mapping[str, str]) -> list[str]:
    """A cycle of modules that import each other, within functions too; empty if there is none."""
    graph = {
        module: {module_of(name) for name in imports_of(source)} - {"", module}
        for module, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    sources = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}
    assert circle_of(sources) == []


def test_an_import_cycle_is_found() -> None:
    """Also one through a package's name and within a function."""
    sources = {
        "megaback.optim.muon": "from megaback.optim import build",
        "megaback.optim.build": "def late():\n    import megaback.optim.muon",
    }
    assert set(circle_of(sources)) == {"megaback.optim.muon", "megaback.optim.build"}


def test_init_files_are_empty_except_the_public_api() -> None:
    """So that importing a module never loads others of its package."""
    full = [
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
        if any(
            isinstance(node, ast.Import | ast.ImportFrom)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]
    assert full == ["megaback/__init__.py"]
