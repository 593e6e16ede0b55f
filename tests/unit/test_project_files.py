"""What stands beside the code agrees with it: version, images, links, guides, what CI runs."""

import re
import subprocess
import sys

from megaback import __version__
from tests.helpers.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "container" / "megaback.def").read_text()


def test_the_package_has_the_version_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-1] == __version__
    written = [
        path for path in ("setup.py", "pyproject.toml") if __version__ in (ROOT / path).read_text()
    ]
    assert written == []


def test_the_changelog_begins_with_this_version() -> None:
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == __version__


def test_both_images_are_made_of_the_same_files_on_the_cuda_of_torch() -> None:
    copied = {
        source
        for words in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in words.split()
    }
    files = DEFINITION.partition("%files\n")[2].partition("\n\n")[0]
    listed = [line.split() for line in files.splitlines()]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()

    assert {source for source, _ in listed} == copied
    assert all(target == f"/opt/megaback/{source}" for source, target in listed)
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert f"\nFrom: {base}\n" in DEFINITION
    locked = (ROOT / "requirements" / "locked-cuda.txt").read_text()
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", locked, re.MULTILINE)
    assert base.startswith(f"nvidia/cuda:{cuda}.")
