"""All commands of the product, for tests that read their options and help."""

from collections.abc import Iterator

import click

from megaback.cli import main as megaback_command
from megaback.train import main as rank_command
from tools.demo import main as demo_command


def _below(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in [*command.list_commands(context), *(["slurm-job"] if name == "" else [])]:
            below = command.get_command(context, word)
            assert below is not None
            yield from _below(below, f"{name} {word}".strip())


COMMANDS_OF_MEGABACK = dict(_below(megaback_command, ""))
"""Commands and groups by the words after `megaback`; the first is `megaback` itself."""
COMMANDS = {
    **COMMANDS_OF_MEGABACK,
    "python -m megaback.train": rank_command,
    "python -m tools.demo": demo_command,
}
