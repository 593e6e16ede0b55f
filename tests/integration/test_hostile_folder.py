"""Real commands in a folder that shadows what megaback imports: a clone, `torch.py`."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_pipeline.common.import_path import module_command
from data_pipeline.errors import ConfigError, LaunchError
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow

MEGABACK = str(Path(sys.executable).with_name("megaback"))
TRAP = "raise SystemExit('the working directory was imported')\n"
# As setuptools' finder of editable packages, which comes after everything on the path.
FINDER = """
import importlib.util, runpy, sys
from importlib.machinery import PathFinder
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        parent, _, _ = name.rpartition(".")
        places = [ROOT if not parent else f"{ROOT}/{parent}"]
        return PathFinder.find_spec(name, places) if name.startswith("megaback") or parent else None
sys.path.remove(ROOT)
sys.path.insert(0, "")
sys.meta_path.append(Finder)
sys.path.append(PIPELINE)
runpy.run_module("megaback", run_name="__main__", alter_sys=True)
"""
SCORE = """
from pathlib import Path
import torch
from data_pipeline.errors import CheckpointMissingError
from megaback.inference.device_pool import DevicePool
from megaback.inference.likelihood import Continuation
if __name__ == "__main__":
    with DevicePool(Path("absent"), [torch.device("cpu")] * 2, torch.float32) as pool:
        try:
            pool.result(pool.submit([Continuation((1,), (2,))]))
        except CheckpointMissingError:
            print("no model")
"""


def run_in(folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    environment = training_environment()
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture
def clone_beside(tmp_path: Path) -> Path:
    """A folder that holds a clone, a folder of wandb, and an unrelated package `tools`."""
    folder = tmp_path / "work"
    for name in ("megaback", "data_pipeline", "launcher", "tools"):
        (folder / "megaback" / name).mkdir(parents=True)
        (folder / "megaback" / name / "__init__.py").write_text(TRAP)
    (folder / "wandb" / "offline-run-1").mkdir(parents=True)
    (folder / "tools").mkdir()
    return folder


@pytest.fixture
def hostile(clone_beside: Path) -> Path:
    """The same, with files and packages named as modules of Python, dependencies and megaback."""
    for name in ("torch", "deepspeed", "numpy", "types", "socket", "pickle", "signal"):
        (clone_beside / f"{name}.py").write_text(TRAP)
    for name in ("data_pipeline", "launcher", "tools"):
        (clone_beside / name).mkdir(exist_ok=True)
        (clone_beside / name / "__init__.py").write_text(TRAP)
    return clone_beside


def test_ranks_import_the_installed_packages(hostile: Path, config_path: Path) -> None:
    done = run_in(hostile, MEGABACK, "train", config_path, "run=out", "training.steps=2")

    assert done.returncode == 0, done.stderr
    meta = json.loads((hostile / "out/checkpoints/step-00000002/meta.json").read_text())
    assert meta["versions"]["megaback"]
    assert json.loads((hostile / "out/exit.json").read_text())["code"] == 0


def test_workers_of_a_build_import_the_installed_packages(
    hostile: Path, tiny_text_folder: Path, tokenizer_path: Path
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("multiprocessing cannot keep the working directory out before Python 3.11")
    # Those of several devices, too.
    scored = run_in(hostile, sys.executable, "-P", "-c", SCORE)
    assert (scored.returncode, scored.stdout) == (0, "no model\n"), scored.stderr
    assert "the working directory was imported" not in scored.stderr
    words = ("--source", tiny_text_folder, "--tokenizer", tokenizer_path, "--out", "shards")
    done = run_in(hostile, MEGABACK, "shards", "build", *words, "--workers", 2)

    assert done.returncode == 0, done.stderr
    assert "the working directory was imported" not in done.stderr
    assert (hostile / "shards" / "manifest.json").is_file()


@pytest.mark.parametrize("has_option", [True, False])
def test_every_python_runs_the_installed_module(hostile: Path, has_option: bool) -> None:
    if has_option and sys.version_info < (3, 11):
        pytest.skip("-P is of Python 3.11")
    done = run_in(hostile, *module_command("megaback", "--version", has_option=has_option))

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("megaback, version")


def test_a_rank_started_by_hand_ignores_the_folder(clone_beside: Path) -> None:
    (clone_beside / "torch.py").write_text(TRAP)
    (clone_beside / "tools" / "__init__.py").write_text(TRAP)

    done = run_in(clone_beside, sys.executable, "-m", "megaback.train", "absent.yaml")

    assert done.returncode == ConfigError.exit_code, done.stderr
    assert "absent.yaml" in done.stderr


def test_an_installation_in_place_is_found_before_a_mere_folder(
    clone_beside: Path, tmp_path: Path
) -> None:
    wheels, unpacked = tmp_path / "wheels", tmp_path / "unpacked"
    build = f"from setuptools import build_meta; build_meta.build_editable({str(wheels)!r})"
    wheels.mkdir()
    subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True, timeout=60
    )
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    look = f"import site; site.addsitedir({str(unpacked)!r}); import megaback; megaback.__version__"
    done = run_in(clone_beside, sys.executable, "-S", "-c", look)

    assert done.returncode == 0, done.stderr


def test_a_folder_that_shadows_the_package_is_refused(clone_beside: Path) -> None:
    places = clone_beside / "places"
    places.mkdir()
    (places / "data_pipeline").symlink_to(ROOT / "data_pipeline")
    code = f"ROOT, PIPELINE = {str(ROOT)!r}, {str(places)!r}\n{FINDER}"
    done = run_in(clone_beside, sys.executable, "-c", code)

    assert done.returncode == LaunchError.exit_code, done.stderr
    assert "the folder `megaback` in the working directory hides the package" in done.stderr


def test_a_script_beside_another_data_pipeline_gets_an_error(hostile: Path) -> None:
    for trap in hostile.glob("*.py"):
        trap.unlink()
    done = run_in(hostile, sys.executable, "-c", "import megaback")

    assert done.returncode != 0
    assert f"Python imports {hostile / 'data_pipeline'}" in done.stderr
    assert "the working directory was imported" not in done.stderr


def test_the_doctor_reports_what_the_folder_shadows(hostile: Path) -> None:
    from megaback.installation import hidden_by

    assert {"torch", "types", "tools", "launcher", "data_pipeline"} <= set(hidden_by(hostile))
    assert not {"megaback", "wandb"} & set(hidden_by(hostile))  # mere folders
    assert hidden_by(ROOT) == []
