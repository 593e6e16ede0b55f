"""Hook of mkdocs: pages keep their paths in the repository, so that their links work on both.

README.md and other pages outside docs/ are pages of the site, and the files that pages link to
(configs, examples) are copied beside them.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"\]\(([^)\s#]+)")
_FENCED = re.compile(r"(^```.*?^```\n)", re.MULTILINE | re.DOTALL)
_TEXT_ABOVE_BLOCK = re.compile(r"^(?![-*] |[|#\s]|\d+\. )(.+\n)(?=[-*] |\||\d+\. )", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    config.nav = [_expanded(entry) for entry in config.nav or []]


def _expanded(entry: Any) -> Any:
    """An entry of `nav`, with the pages of folders in place of folders."""
    if isinstance(entry, list):
        return [_expanded(one) for one in entry]
    if isinstance(entry, dict):
        return {title: _expanded(below) for title, below in entry.items()}
    if not entry.endswith("/"):
        return entry
    pages = sorted((ROOT / entry).glob("*.md"), key=lambda page: (page.name != "README.md", page))
    return [page.relative_to(ROOT).as_posix() for page in pages]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of docs/ and of `nav`, and the files that they link to."""
    theme = [file for file in files if not file.src_dir or Path(file.src_dir) != ROOT / "docs"]
    found = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".png")]
    found += [ROOT / name for name in _names(config.nav)]
    for page in [path for path in found if path.suffix == ".md" and path.exists()]:
        links = (page.parent / link for link in _LINK.findall(page.read_text(encoding="utf-8")))
        found += [path.resolve() for path in links if path.is_file()]
    names = sorted({path.relative_to(ROOT).as_posix() for path in found})
    worker = File.generated(
        config, "assets/iframe-worker.js", abs_src_path=str(ROOT / "docs/site/iframe-worker.js")
    )
    return Files([*theme, worker, *(_file(name, config) for name in names)])


def _names(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    below = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in below for name in _names(entry)]


def _file(name: str, config: MkDocsConfig) -> File:
    """A file of the repository; what is in docs/ is at the top of the site."""
    file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with an empty line above each list and table, without which mkdocs shows neither."""
    parts = _FENCED.split(markdown)
    parts[::2] = [_TEXT_ABOVE_BLOCK.sub(r"\1\n", part) for part in parts[::2]]
    return "\n".join(parts)
