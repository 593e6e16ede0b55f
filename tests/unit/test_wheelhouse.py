"""`make wheelhouse`: which wheels are taken, for which Python, and what is written about them.

pip itself takes them, from a folder of tiny wheels instead of a network.
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from data_pipeline.errors import BackendError, ConfigError
from requirements.wheelhouse import Target, describe, extras_of, fill, locked_pins, wheels_of
from tests.helpers.paths import ROOT

PYTHON = f"3.{sys.version_info.minor}"
HERE = Target(PYTHON)
TAG = f"cp3{sys.version_info.minor}"
FIRST = f"first-1.0-{TAG}-{TAG}-manylinux_2_28_x86_64.whl"


def make_wheel(folder: Path, file_name: str, *lines: str) -> Path:
    """A wheel with one empty module and these lines of metadata."""
    name, version, *_, tag = file_name.removesuffix(".whl").split("-", 2)
    info = f"{name}-{version}.dist-info"
    path = folder / file_name
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", "")
        metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *lines]
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(
            f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        )
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n")
    return path


@pytest.fixture(scope="module")
def no_network() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        yield patch


def make_index(folder: Path) -> Path:
    """Wheels that pip is to find."""
    folder.mkdir()
    make_wheel(folder, FIRST, "Requires-Dist: second[fast]>=1")
    make_wheel(
        folder,
        "second-1.5-py3-none-any.whl",
        "Provides-Extra: fast",
        'Requires-Dist: third; extra == "fast"',
        'Requires-Dist: absent; python_version < "3"',
        'Requires-Dist: windows; sys_platform == "win32"',
        "Requires-Dist: torch>=2",
    )
    make_wheel(folder, "third-2.0-py3-none-any.whl", "Requires-Dist: first")
    make_wheel(folder, "tester-3.0-py3-none-any.whl")
    make_wheel(folder, "asked-4.0-py3-none-any.whl")
    return folder


def make_own(folder: Path) -> Path:
    """A wheel of megaback in the folder to fill."""
    folder.mkdir()
    return make_wheel(
        folder,
        "megaback-9.0-py3-none-any.whl",
        "Provides-Extra: more",
        "Requires-Dist: first>=1",
        "Requires-Dist: large",
        'Requires-Dist: asked; extra == "more"',
    )


def pins_of(index: Path, **versions: str) -> dict[str, str]:
    """Locked lines of the wheels of an index; some with other versions."""
    lines = ""
    for name, path in wheels_of(index).items():
        version = versions.get(name, path.name.split("-")[1])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        lines += f"{name}=={version} \\\n    --hash=sha256:{digest}\n"
    return locked_pins("# a comment\n" + lines, HERE)


@pytest.fixture
def index(tmp_path: Path, no_network: pytest.MonkeyPatch) -> Path:
    folder = make_index(tmp_path / "index")
    no_network.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return make_own(tmp_path / "out")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, no_network: pytest.MonkeyPatch) -> Path:
    """A wheelhouse with an extra; its index is not found any more."""
    folder = tmp_path_factory.mktemp("filled")
    index = make_index(folder / "index")
    no_network.setenv("PIP_FIND_LINKS", str(index))
    own = make_own(folder / "out")
    fill(own.parent, own, pins_of(index), HERE, ["more"], ["large"], ["tester"])
    num_bytes = describe(own.parent, HERE, ["pyarrow"])
    assert num_bytes == sum(path.stat().st_size for path in own.parent.iterdir())
    no_network.delenv("PIP_FIND_LINKS")
    return own.parent


def test_the_requirements_of_requirements_are_taken_but_not_torch(filled: Path) -> None:
    taken = {"megaback", "first", "second", "third", "tester", "asked"}
    assert set(wheels_of(filled)) == taken
    assert extras_of(wheels_of(filled)["megaback"]) == {"more"}


def test_pip_installs_from_the_folder_with_nothing_else(filled: Path, tmp_path: Path) -> None:
    words = ("install", "--no-index", "--find-links", filled, "--no-deps", "--quiet")
    target = ("--target", tmp_path / "there", "-r", filled / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", *words, *target], check=True, capture_output=True)

    installed = {path.stem for path in (tmp_path / "there").glob("*.py")}
    assert installed == set(wheels_of(filled))


def test_omitted_packages_are_named(filled: Path) -> None:
    assert "| pyarrow | parquet files |" in (filled / "README.md").read_text()


def test_the_sums_are_those_of_every_file(filled: Path) -> None:
    command = ("sha256sum", "--check", "--strict", "SHA256SUMS")
    done = subprocess.run(command, cwd=filled, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == len(list(filled.iterdir())) - 1


def test_a_wheel_with_another_hash_is_refused(index: Path, own: Path) -> None:
    pins = pins_of(index)
    make_wheel(index, "third-2.0-py3-none-any.whl", "Summary: another")

    with pytest.raises(BackendError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        fill(own.parent, own, pins, HERE, omitted=["large"], also=["tester"])


def test_wheels_for_another_python_are_not_taken(index: Path, own: Path) -> None:
    other = Target("3.10" if PYTHON != "3.10" else "3.12")
    with pytest.raises(BackendError, match=r"pip download failed: .*first"):
        fill(own.parent, own, pins_of(index), other, omitted=["large"], also=["tester"])


def test_a_package_that_is_not_locked_is_named(index: Path, own: Path) -> None:
    pins = pins_of(index)
    del pins["third"]
    with pytest.raises(ConfigError, match=r"third: not in locked.txt.*make lock"):
        fill(own.parent, own, pins, HERE, omitted=["large"], also=["tester"])


def test_a_locked_version_that_is_too_old_is_named(index: Path, own: Path) -> None:
    make_wheel(index, FIRST, "Requires-Dist: second>=2")
    with pytest.raises(ConfigError, match=r"second>=2 is required, but locked.txt has 1.5"):
        fill(own.parent, own, pins_of(index), HERE, omitted=["large"], also=["tester"])


@pytest.mark.parametrize("python", ["3.10", "3.12", "3.13"])
def test_locked_packages_are_chosen_for_the_target(python: str) -> None:
    pins = locked_pins((ROOT / "requirements" / "locked.txt").read_text(), Target(python))
    assert "--hash=sha256:" in pins["deepspeed"]
    assert ("exceptiongroup" in pins) == (python == "3.10")
    assert "torch" not in pins


def command(*words: object) -> "subprocess.CompletedProcess[str]":
    script = ROOT / "requirements" / "wheelhouse.py"
    return subprocess.run(
        [sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False
    )


def test_a_folder_of_others_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    done = command("--out", tmp_path)
    assert done.returncode == 44, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("version", ["3.9", "3", "4.0", "x"])
def test_a_python_that_does_not_fit_is_refused(version: str, tmp_path: Path) -> None:
    done = command("--out", tmp_path / "out", "--python-version", version)
    assert done.returncode == 10, done.stderr
    assert not (tmp_path / "out").exists()
