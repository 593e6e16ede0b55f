"""`megaback inspect`: identifies and checks a path, and suggests the next commands."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@click.command(
    cls=Command,
    name="inspect",
    epilog=examples(
        "megaback inspect runs/xcoax_100bt",
        "megaback inspect data/fineweb-100bt --verify --json",
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--verify", is_flag=True, help="Hash and decode everything, instead of only comparing sizes."
)
@json_option
def main(path: Path, verify: bool, as_json: bool) -> None:
    """Identify PATH: a data set, a shard, a tokenizer, a run, a checkpoint or a model.

    Damaged paths, and paths that megaback did not write, are errors with their own exit codes.
    """
    from tools.artifacts import inspect

    found = inspect(path, verify=verify)
    if as_json:
        fields = {
            "kind": found.kind,
            "path": str(found.path),
            "whole": found.is_whole,
            "checked": found.checked,
            "verified": verify,
            "facts": dict(found.facts),
            "next": dict(found.next_lines),
        }
        click.echo(json.dumps(fields, indent=2, default=str))
        return
    whole = "yes" if found.is_whole else "not yet"
    lines = {"what": f"{found.kind}, {found.path}", "whole": f"{whole}: {found.checked}"}
    lines |= {name: _shown(value) for name, value in found.facts.items() if value is not None}
    width = max(map(len, lines))
    for name, text in lines.items():
        echo(f"{name:<{width}}  {text}")
    for number, (line, meaning) in enumerate(found.next_lines.items()):
        click.echo(f"{'next' if not number else '':<{width}}  {line}   # {meaning}")


if __name__ == "__main__":
    main()
