"""Editable and wheel installations of megaback beside other packages of the same names."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import LaunchError
from tests.helpers.tiny_run import tiny_config, training_environment
from tests.helpers.wheel_environment import OWN_PACKAGES, plant

pytestmark = pytest.mark.slow

EMPTY = (*OWN_PACKAGES, "megaback_x")
LOAD = """
import tools, launcher
import megaback
print(megaback.load("run").complete_backwards("near the river.", max_new_tokens=2) and tools.MINE)
"""
LIBRARY = """
import signal, sys
import megaback
print(sys.path[0], signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
NOVELS = """
from data_pipeline.sources.novels.source import list_novels_slices, read_novels_slice
print([sum(1 for _ in read_novels_slice(piece)) for piece in list_novels_slices()])
"""
SHADOWED = """
import sys
import tools
sys.argv = ["megaback"]
from megaback.cli import main
main(["sample", "--help"])
"""


def run_in(folder: Path, *words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = training_environment() | variables
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module", params=["in place", "wheel"])
def python(request: pytest.FixtureRequest) -> Path:
    if request.param == "in place":
        return Path(sys.executable)
    path: Path = request.getfixturevalue("wheel_python")
    return path


@pytest.fixture(scope="module")
def run_of_wheel(
    wheel_python: Path, tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path
) -> Path:
    """A run on two ranks beside empty packages, with failing modules on PYTHONPATH."""
    folder = plant(tmp_path_factory.mktemp("hostile"), *EMPTY, content="")
    config = tiny_config(tiny_shards) | {"training": {"steps": 2, "precision": "fp32"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = plant(tmp_path_factory.mktemp("theirs"), *EMPTY)
    done = subprocess.run(
        [wheel_python.with_name("megaback"), "train", "config.yaml"],
        cwd=folder,
        env=training_environment() | {"PYTHONPATH": f"{path}:"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_ranks_of_a_wheel_train_beside_packages_of_our_names(run_of_wheel: Path) -> None:
    assert json.loads((run_of_wheel / "exit.json").read_text())["code"] == 0
    assert len(json.loads((run_of_wheel / "preflight.json").read_text())["ranks"]) == 2


def test_a_script_loads_a_model_beside_its_own_tools(
    run_of_wheel: Path, wheel_python: Path, tmp_path: Path
) -> None:
    plant(tmp_path, "tools", "launcher", content="MINE = 'mine'\n")
    (tmp_path / "run").symlink_to(run_of_wheel)
    (tmp_path / "script.py").write_text(LOAD)

    done = run_in(tmp_path, wheel_python, "script.py")

    assert (done.returncode, done.stdout) == (0, "mine\n"), done.stderr


def test_workers_inherit_the_order_of_the_path(
    tmp_path: Path, tiny_text_folder: Path, tokenizer_path: Path
) -> None:
    path = str(plant(tmp_path / "theirs", *EMPTY))
    words = ("--source", tiny_text_folder, "--tokenizer", tokenizer_path, "--out", "shards")
    command = (sys.executable, "-m", "megaback", "shards", "build", *words, "--workers=2")

    done = run_in(tmp_path, *command, PYTHONPATH=path)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [("--help",), ("sample", "--help"), ("plan", "--help")])
def test_a_command_is_found_beside_traps(
    python: Path, words: tuple[str, ...], tmp_path: Path
) -> None:
    plant(tmp_path, *EMPTY)
    (tmp_path / "typing.py").write_text("raise SystemExit('not ours')\n")

    done = run_in(tmp_path, python, "-m", "megaback", *words)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: megaback")


def test_pythonpath_may_hold_packages_of_our_names(python: Path, tmp_path: Path) -> None:
    plant(tmp_path / "theirs", *EMPTY)
    for path in (str(tmp_path / "theirs"), f"{tmp_path / 'theirs'}:"):
        done = run_in(tmp_path, python, "-m", "megaback", "sample", "--help", PYTHONPATH=path)
        assert done.returncode == 0, done.stderr


def test_a_package_that_imports_megaback_keeps_its_path_and_signals(
    python: Path, tmp_path: Path
) -> None:
    plant(tmp_path, "mine", content=LIBRARY)
    (tmp_path / "mine" / "__main__.py").write_text("")

    done = run_in(tmp_path, python, "-m", "mine")

    assert done.stdout.split() == [str(tmp_path), "True"], done.stderr


def test_the_novels_come_with_a_package(python: Path, tmp_path: Path) -> None:
    done = run_in(tmp_path, python, "-c", NOVELS)

    assert done.stdout == "[55, 48, 136, 31, 24, 61, 50]\n", done.stderr


def test_a_package_that_shadows_tools_is_named(python: Path, tmp_path: Path) -> None:
    plant(tmp_path, "tools", content="")
    (tmp_path / "script.py").write_text(SHADOWED)

    done = run_in(tmp_path, python, "script.py")

    assert done.returncode == LaunchError.exit_code, done.stderr
    assert f"no module tools.sample in {tmp_path / 'tools' / '__init__.py'}" in done.stderr
