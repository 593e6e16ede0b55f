"""Project files agree with the code: version, site, images, links, guides, CI."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaback import __version__
from tests.helpers.paths import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFINITION = (ROOT / "container" / "megaback.def").read_text()
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
BESIDE = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
PAGES = sorted([*BESIDE, *(ROOT / "docs").rglob("*.md")])
SOURCES = "".join(
    path.read_text()
    for package in ("data_pipeline", "megaback", "launcher", "tools", "tests")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path != Path(__file__)
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Link fragments of the headings of a page, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Relative links of a page to missing files or headings."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name
        is_there = path.exists() and (
            not anchor or anchor in anchors(path.read_text() if name else text)
        )
        if not is_there:
            yield link


def strings(nav: Any) -> Iterator[str]:
    """The pages and folders of a `nav` of mkdocs."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from strings(entry)


def of_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_has_a_target(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_every_file_of_ours_that_a_page_names_exists(page: Path) -> None:
    folders = "data_pipeline|megaback|launcher|tools|tests|configs|container|examples|requirements"
    paths = re.findall(rf"`((?:{folders})/[a-z_0-9/.]*)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_navigation_once() -> None:
    """`make docs` renders them; this test needs no mkdocs."""
    listed = list(strings(of_yaml("mkdocs.yml")["nav"]))
    folders = [ROOT / name for name in listed if name.endswith("/")]
    pages = [page for folder in folders for page in folder.glob("*.md")]
    pages += [ROOT / name for name in listed if not name.endswith("/")]

    assert sorted(pages) == [page for page in PAGES if page != ROOT / "AGENTS.md"]


def test_no_page_links_to_a_folder() -> None:
    """A code host lists a folder; a site has no page for it."""
    found = [
        (page.name, link)
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s:#]+)\)", without_code(page.read_text()))
        if (page.parent / link).is_dir()
    ]
    assert found == []


def test_the_index_of_decisions_has_each_with_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    index = re.findall(r"^(\d+\. )\[(.+)\]\((.+)\)$", (folder / "README.md").read_text(), re.M)
    assert [(name, f"# {number}{title}") for number, title, name in index] == [
        (path.name, path.read_text().partition("\n")[0]) for path in sorted(folder.glob("0*.md"))
    ]


def test_a_broken_link_is_found() -> None:
    text = (
        "# Words, and more\n[a](absent.md) [b](README.md#nowhere) [c](#words-and-more) [d](#word)"
    )
    assert list(broken_links(ROOT / "page.md", text)) == [
        *("absent.md", "README.md#nowhere", "#word"),
    ]


def test_every_path_and_name_in_the_guide_exists() -> None:
    section = GUIDE.partition("## How to add")[2].partition("## Before")[0]
    words = set(re.findall(r"`([\w./]+)`", section)) - {"main", "name"}
    paths = {word for word in words if "/" in word and "NAME" not in word}
    names = {word for word in words if re.fullmatch(r"_?[A-Z]\w+|_\w+|\w+_\w+", word)}

    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert [name for name in sorted(names) if not re.search(rf"\b{name}\b", SOURCES)] == []
    assert len(paths) > 20
    assert len(names) > 15


def test_agents_md_links_to_the_guide() -> None:
    assert "[CONTRIBUTING.md](CONTRIBUTING.md)" in (ROOT / "AGENTS.md").read_text()


def test_the_glossary_is_sorted_and_has_each_word_once() -> None:
    words = re.findall(r"^\| \*\*(.+?)\*\*", GUIDE.partition("## Glossary")[2], re.MULTILINE)
    assert words == sorted(set(words), key=str.lower)


def test_the_citation_is_of_this_version() -> None:
    citation = of_yaml("CITATION.cff")
    assert str(citation["version"]) == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"


def test_ci_runs_the_script_of_the_repository() -> None:
    job = of_yaml(".github/workflows/ci.yml")["jobs"]["test"]
    assert job["steps"][-1]["run"] == ".ci/run"
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.13"]


def test_hooks_run_the_ruff_of_the_environment() -> None:
    (repository,) = of_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert all(one == "make lint" or one.startswith(".venv/bin/ruff ") for one in entries)


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
    (extras,) = re.findall(r"'\.\[(.+)\]'", (ROOT / "container" / "install.sh").read_text())
    known = set(re.findall(r'^        "([a-z-]+)": \[', (ROOT / "setup.py").read_text(), re.M))
    assert set(extras.split(",")) <= known
    locked = (ROOT / "requirements" / "locked-cuda.txt").read_text()
    (cuda,) = re.findall(r"^cuda-toolkit==(\d+\.\d+)\.", locked, re.MULTILINE)
    assert base.startswith(f"nvidia/cuda:{cuda}.")
