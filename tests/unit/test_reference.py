"""The generated pages of docs/reference/ agree with the code, on every machine."""

import re
import subprocess
import sys
from pathlib import Path

import click

import megaback
from data_pipeline.common.number_ranges import COUNT
from docs.generate.__main__ import outdated, pages, write
from docs.generate.commands import page as command_page
from docs.generate.python_api import INTERNAL
from megaback.cli import command_modules, main
from tests.helpers.paths import ROOT

ELSEWHERE = {"HOME": "/nowhere", "COLUMNS": "30", "LANG": "C", "TZ": "Asia/Tokyo", "NO_COLOR": "1"}


def test_the_pages_are_up_to_date_in_any_environment() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.generate", "--check"],
        cwd=ROOT,
        env=ELSEWHERE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_outdated_pages_are_named_and_regenerated(tmp_path: Path) -> None:
    write(tmp_path)
    assert outdated(tmp_path) == []
    page = tmp_path / "commands" / "sample.md"
    page.write_text(page.read_text().replace("`--seed`", "`--sede`"))
    (tmp_path / "config.md").unlink()
    (tmp_path / "commands" / "renamed.md").write_text("of a command that is gone")
    (tmp_path / "commands" / "notes.txt").write_text("not a page")

    assert outdated(tmp_path) == ["commands/renamed.md", "commands/sample.md", "config.md"]
    write(tmp_path)
    assert outdated(tmp_path) == []
    assert (tmp_path / "commands" / "notes.txt").exists()


def test_every_command_option_key_and_name_is_listed() -> None:
    made = pages()
    commands = {name.replace(" ", "-"): name for name in command_modules()}

    assert {f"commands/{page}.md" for page in commands} | {"commands/README.md"} == {
        name for name in made if name.startswith("commands/")
    }
    assert "| `--top-p` | `FLOAT`, `0<x<=1` | `1.0` |" in made["commands/sample.md"]
    assert "| `training.precision` | `bf16`, `fp32` | `bf16` |" in made["config.md"]
    assert re.search(r"\| `guard.spike_norm_ratio` \| number, `x>1` \|  \| \w", made["config.md"])
    assert "\n### `Writer.stream`\n" in made["python.md"]
    for name in INTERNAL:
        owner, member = name.split(".")
        kind = getattr(megaback, owner)
        assert member in {*vars(kind), *getattr(kind, "__dataclass_fields__", ())}
        assert f"`{name}`" not in made["python.md"]
    assert str(ROOT) not in "".join(made.values())


def test_a_page_has_the_whole_help_of_a_command() -> None:
    command = click.Command(
        "cut",
        help="Cut a_b of *FILE* into\nparts.\n\nNever <twice>.\f Not for users.",
        epilog="Examples:\n\n\b\nmegaback cut a.txt \\\n  --into 3",
        params=[
            click.Argument(["file"]),
            click.Option(["-n", "--into"], type=COUNT.option, default=2, show_default=True),
            click.Option(["--by"], type=click.Choice(["line", "word"]), required=True, help="a|b."),
            click.Option(["--keep/--no-keep"], help="Keep `a_*`."),
            click.Option(["--secret"], hidden=True),
        ],
    )
    context = click.Context(
        command, info_name="cut", parent=click.Context(main, info_name="megaback")
    )

    assert command_page(context) == (
        "# megaback cut\n\n```text\nmegaback cut [OPTIONS] FILE\n```\n\n"
        "Cut a_b of \\*FILE\\* into parts.\n\nNever \\<twice>.\n\n"
        "| option | value | default | description |\n| --- | --- | --- | --- |\n"
        "| `-n`, `--into` | `INTEGER`, `x>=1` | `2` |  |\n"
        "| `--by` | `line`, `word` | required | a\\|b. |\n"
        "| `--keep` / `--no-keep` |  |  | Keep `a_*`. |\n"
        "| `--help` |  |  | Show this message and exit. |\n\n"
        "Examples:\n\n```\nmegaback cut a.txt \\\n  --into 3\n```\n"
    )
