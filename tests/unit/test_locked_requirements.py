"""The locked files agree with constraints.txt, are complete, and hash every file."""

import re
from collections.abc import Iterator

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

LOCKS = ROOT / "requirements"
DOCS = "locked-docs.txt"
FILES = ["locked-build.txt", "locked.txt", "locked-cpu.txt", "locked-cuda.txt", DOCS]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
_HASHED = re.compile(r"(?P<requirement>[^\\\n]+?)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n")


def requirements(name: str) -> list[Requirement]:
    """Requirements of a locked file; any other line fails."""
    text = (LOCKS / name).read_text()
    lines = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    assert _HASHED.sub("", lines) == "", name
    return [Requirement(found["requirement"]) for found in _HASHED.finditer(lines)]


def on(python: str, wanted: list[Requirement]) -> Iterator[Requirement]:
    """Requirements that are installed on Linux with a version of Python."""
    environment = {**default_environment(), "python_version": python}
    environment |= {"python_full_version": f"{python}.0", "sys_platform": "linux"}
    for one in wanted:
        if one.marker is None or one.marker.evaluate(environment):
            yield one


def pins(python: str) -> dict[str, str]:
    """Versions of a development install, by package."""
    found: dict[str, str] = {}
    for name in ("locked-build.txt", "locked.txt", "locked-cuda.txt"):
        for one in on(python, requirements(name)):
            (specifier,) = one.specifier
            assert specifier.operator == "==", one
            assert canonicalize_name(one.name) not in found, f"{one} twice"
            found[canonicalize_name(one.name)] = specifier.version
    return found


def pins_of_docs(python: str) -> dict[str, str]:
    found = {one.name: str(one.specifier) for one in on(python, requirements(DOCS))}
    return {canonicalize_name(name): text.removeprefix("==") for name, text in found.items()}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_site_has_the_shared_packages_of_a_development_install(python: str) -> None:
    docs, locked = pins_of_docs(python), pins(python)
    shared = docs.keys() & locked.keys()
    assert {name: docs[name] for name in shared} == {name: locked[name] for name in shared}
    assert {"mkdocs", "mkdocs-material"} <= docs.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_locked_versions_are_the_constrained_ones(python: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = pins_of_docs(python) | pins(python)
    for one in on(python, constraints):
        version = locked[canonicalize_name(one.name)]
        assert one.specifier.contains(version, prereleases=True), (one, version)


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_of_setup_py_is_locked(
    python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr("setuptools.setup", lambda **fields: given.update(fields))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": "setup.py"})
    wanted = [*given["install_requires"], *given["extras_require"]["dev"]]  # type: ignore[misc, index]
    locked = pins(python)
    for one in on(python, [Requirement(text) for text in wanted]):
        assert one.specifier.contains(locked[canonicalize_name(one.name)], prereleases=True), one


def test_torch_for_cpus_is_the_same_version_as_for_cuda() -> None:
    (cpu,) = requirements("locked-cpu.txt")
    assert str(cpu.specifier) == f"=={pins('3.11')['torch']}+cpu"


def test_no_locked_file_names_an_index_or_a_path() -> None:
    for path in LOCKS.glob("*.txt"):
        assert path.name in FILES
        assert not re.search(r"://|index|find-links|^-", path.read_text(), re.MULTILINE), path


def test_ci_installs_by_hash() -> None:
    calls = re.findall(r"^make (.*)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert all(call.startswith('HASHES="${HASHES:-yes}" ') for call in calls)
    assert {*" ".join(calls).split()} >= {"lint", "flash-test", "docs", "pytest"}
    recipe = (ROOT / "Makefile").read_text()
    assert "--no-deps --require-hashes" in recipe
