"""Structure of the code: imports between packages, modules that help may load, lengths of files."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from megaback.cli import command_modules
from megaback.cli import main as megaback_command
from tests.helpers.paths import ROOT
from tests.helpers.warm_start import COLD_VARIABLE

ALLOWED = {
    "data_pipeline": {"data_pipeline"},
    "megaback": {"megaback", "data_pipeline"},
    "launcher": {"launcher", "megaback", "data_pipeline"},
    "tools": {"tools", "launcher", "megaback", "data_pipeline"},
}
FILES = {
    package: sorted((ROOT / package).rglob("*.py"))
    for package in (*ALLOWED, "tests", "benchmarks")
    if (ROOT / package).is_dir()
}
WITHOUT_TORCH = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (
        *FILES["data_pipeline"],
        *FILES["launcher"],
        *sorted((ROOT / "megaback" / "planning").glob("*.py")),
    )
    if path.name != "__init__.py"
]
COMMANDS = command_modules()
MAX_LINES = 450
MAX_CPU_SECONDS = 0.5

# Runs in a fresh interpreter, and writes the loaded modules after the command has run.
_REPORT_LOADED = """
import atexit, json, resource, sys
def report():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    with open(sys.argv.pop(), "w") as file:
        json.dump([sorted(sys.modules), usage.ru_utime + usage.ru_stime], file)
report_path = sys.argv[-1]
atexit.register(report)
"""


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def loaded_by(code: str, tmp_path: Path) -> tuple[set[str], float]:
    """Modules that a fresh interpreter has loaded after running some code, and its CPU seconds."""
    report = tmp_path / "loaded.json"
    subprocess.run(
        [sys.executable, "-c", f"{_REPORT_LOADED}\n{code}", report],
        check=True,
        capture_output=True,
        cwd=ROOT,
        timeout=60,
    )
    modules, cpu_seconds = json.loads(report.read_text())
    return set(modules), cpu_seconds


def help_of(words: str) -> str:
    """Code that runs a megaback command with --help."""
    return f"from megaback.cli import main; main({[*words.split(), '--help']!r})"


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES[package]
        for module in imported_modules(path)
        if module.split(".")[0] in {*ALLOWED, "tests"} - ALLOWED[package]
    ]

    assert wrong == []


@pytest.mark.parametrize("package", ALLOWED)
def test_no_import_is_relative(package: str) -> None:
    """But those of an export's code, which transformers loads from a folder of any name."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in FILES[package]
        if path.parent.name != "remote_code"
        and any(module.startswith(".") for module in imported_modules(path))
    ]

    assert wrong == []


def test_every_command_lives_in_one_of_the_four_packages() -> None:
    assert {module.split(".")[0] for module in COMMANDS.values()} <= set(ALLOWED)


def first_with_torch(steps: Iterable[str], step: str, tmp_path: Path) -> list[str]:
    """Run some code for each word in one fresh interpreter; the first word that loads torch."""
    code = f"""
import importlib, sys
from contextlib import suppress
from megaback.cli import main
for words in {list(steps)!r}:
    {step}
    if {{"torch", "deepspeed"}} & sys.modules.keys():
        sys.modules[f"culprit {{words}}"] = None
        break
    sys.modules[f"done {{words}}"] = None
"""
    modules, _ = loaded_by(code, tmp_path)
    assert len([name for name in modules if name.startswith(("culprit ", "done "))]) > 0
    culprits = [name for name in modules if name.startswith("culprit ")]
    missing = [words for words in steps if f"done {words}" not in modules]
    return culprits or missing


def test_the_launcher_the_data_pipeline_and_planning_load_no_torch(tmp_path: Path) -> None:
    assert first_with_torch(WITHOUT_TORCH, "importlib.import_module(words)", tmp_path) == []


def test_help_and_completion_load_no_torch(tmp_path: Path) -> None:
    asking = """
    from click.shell_completion import ShellComplete
    assert ShellComplete(main, {}, "megaback", "").get_completions(words.split(), "--")
    with suppress(SystemExit):
        main([*words.split(), "--help"])
"""

    assert first_with_torch(["", "shards", "tokenizer", *COMMANDS], asking, tmp_path) == []


def test_a_command_that_loads_torch_is_found(tmp_path: Path) -> None:
    loading = ["click", "torch.version", "json"]

    assert first_with_torch(loading, "importlib.import_module(words)", tmp_path) == [
        "culprit torch.version"
    ]


def test_the_help_of_megaback_takes_less_than_half_a_second(tmp_path: Path) -> None:
    _, cpu_seconds = loaded_by(help_of(""), tmp_path)

    assert cpu_seconds < MAX_CPU_SECONDS


@pytest.mark.parametrize(("words", "module"), COMMANDS.items())
def test_every_command_can_be_run_as_a_module(words: str, module: str) -> None:
    as_module = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {COLD_VARIABLE: "1"},
    )
    # click's width of a terminal where there is none.
    arguments = [*words.split(), "--help"]
    as_command = CliRunner().invoke(megaback_command, arguments, terminal_width=78)

    def body(text: str) -> str:
        return re.sub(r"^Usage: .*? \[OPTIONS\]", "", text)

    assert (as_module.returncode, as_module.stderr) == (0, "")
    assert body(as_module.stdout) == body(as_command.stdout)


@pytest.mark.parametrize("package", FILES)
def test_every_file_is_short(package: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES[package]
    }

    assert {name: lines for name, lines in lengths.items() if lines >= MAX_LINES} == {}


@pytest.mark.parametrize(
    ("stage", "compiler"), [(2, "torch._dynamo"), (3, "torch._inductor.compile_fx")]
)
def test_training_without_compilation_loads_no_compiler(
    stage: int, compiler: str, tmp_path: Path
) -> None:
    """PyTorch's optimizers and DeepSpeed would: more than a second of every rank at every start."""
    code = """
from megaback.config import Config
from megaback.distributed.world import start_world
from megaback.distributed.engine import start_engine
from megaback.model.gpt import ReverseGPT
config = Config.model_validate({
    "run": "run", "data": {"shards": "shards"},
    "model": {"num_layers": 1, "width": 8, "num_heads": 1},
    "batch": {"context_tokens": 8, "global_batch_rows": 1, "micro_batch_rows": 1},
    "optimizer": {"learning_rate": 1e-3}, "training": {"steps": 1, "precision": "fp32"},
    "zero": {"stage": STAGE},
})
start_world("cpu", 60)
engine = start_engine(ReverseGPT(config.model, 16), config, 1, 1)
optimizer = engine.optimizer.optimizer
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
"""
    loaded, _ = loaded_by(code.replace("STAGE", str(stage)), tmp_path)
    assert "deepspeed.runtime.zero.stage3" in loaded
    assert {compiler, "setuptools"} & loaded == set()


def test_training_needs_neither_wandb_nor_tensorboard(tmp_path: Path) -> None:
    code = """
import sys
sys.modules |= {"wandb": None, "tensorboard": None}
import megaback.tracking.metrics_log, megaback.train
from megaback.tracking.trackers import Trackers
from megaback.config import Config
config = Config.model_validate({
    "run": "run", "data": {"shards": "shards"},
    "model": {"num_layers": 1, "width": 8, "num_heads": 1},
    "batch": {"context_tokens": 8, "global_batch_rows": 1, "micro_batch_rows": 1},
    "optimizer": {"learning_rate": 1e-3}, "training": {"steps": 1},
})
Trackers(config, -1, print).feed([{"step": 1, "loss": 2.0}])
"""
    loaded, _ = loaded_by(code, tmp_path)
    assert "megaback.train" in loaded
    assert {
        "megaback.tracking.wandb_tracker",
        "megaback.tracking.tensorboard_tracker",
    } & loaded == set()


def test_sampling_loads_no_compiler(tmp_path: Path) -> None:
    """Loading it takes most of a second."""
    code = """
import torch
import megaback.inference.infill.infiller, megaback.inference.text_writer
from megaback.config import ModelSection
from megaback.model.gpt import ReverseGPT
from megaback.inference.decoder import Decoder
with torch.device("meta"):
    model = ReverseGPT(ModelSection(num_layers=1, width=8, num_heads=1).resolved(), 16)
model.to_empty(device="cpu").initialize(0)
list(Decoder(model, 8).read_steps([1, 2]))
"""
    loaded, _ = loaded_by(code, tmp_path)
    assert "torch" in loaded
    assert "torch._dynamo" not in loaded
