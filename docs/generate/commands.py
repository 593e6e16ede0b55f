"""Reference of the command line: an index, and a page per command."""

import re
from collections.abc import Iterator

import click

from docs.generate.markdown import code, prose, table
from megaback.cli import main

_INDEX = "commands/README.md"


def pages() -> dict[str, str]:
    """Pages by their path below docs/reference/."""
    found = list(_commands(main, click.Context(main, info_name="megaback")))
    made = {f"commands/{_page_name(context)}": page(context) for context in found}
    return {_INDEX: _index(found)} | made


def _commands(command: click.Command, context: click.Context) -> Iterator[click.Context]:
    """Contexts of all commands that help lists, in the order of their names."""
    if not isinstance(command, click.Group):
        yield context
        return
    for name in sorted(command.list_commands(context)):
        below = command.get_command(context, name)
        assert below is not None
        yield from _commands(below, click.Context(below, info_name=name, parent=context))


def _page_name(context: click.Context) -> str:
    return "-".join(context.command_path.split()[1:]) + ".md"


def _index(found: list[click.Context]) -> str:
    rows = [
        (f"[`{one.command_path}`]({_page_name(one)})", prose(one.command.get_short_help_str(1000)))
        for one in found
    ]
    return (
        "# Commands\n\nEach command prints this as text with `--help`.\n\n"
        + table(["command", "description"], rows)
    ).rstrip() + "\n"


def page(context: click.Context) -> str:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"# megaback {context.command_path.partition(' ')[2]}\n"]
    parts += [f"```text\n{usage}\n```\n", *_paragraphs(command.help)]
    parts += [
        table(["option", "value", "default", "description"], _options(context)).rstrip() + "\n"
    ]
    parts += _paragraphs(command.epilog)
    return "\n".join(parts)


def _paragraphs(text: str | None) -> Iterator[str]:
    """Paragraphs of help; those that click prints as they are, after `\\b`, are code."""
    shown = (text or "").partition("\f")[0]
    for paragraph in re.split(r"\n\s*\n", shown.strip()):
        if paragraph.startswith("\b"):
            lines = paragraph.partition("\n")[2].splitlines()
            indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
            yield "```\n" + "".join(f"{line[indent:]}\n" for line in lines) + "```\n"
        elif paragraph:
            yield prose(paragraph) + "\n"


def _options(context: click.Context) -> Iterator[list[str]]:
    for option in context.command.get_params(context):
        if not isinstance(option, click.Option) or option.hidden:
            continue
        names = ", ".join(code(name) for name in sorted(option.opts, key=len))
        if option.secondary_opts:
            names += " / " + ", ".join(code(name) for name in option.secondary_opts)
        extra = option.get_help_extra(context)
        default = "required" if "required" in extra else code(extra.get("default", ""))
        yield [names, _value(option, context, extra.get("range", "")), default, _help(option)]


def _value(option: click.Option, context: click.Context, allowed: str) -> str:
    """Values that an option takes: its choices, or its type and range."""
    if option.is_flag or option.count:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(
            code(option.type.normalize_choice(one, context)) for one in option.type.choices
        )
    metavar = option.make_metavar(context)
    kind = code(metavar.removesuffix(" RANGE"))
    return f"{kind}, {code(allowed)}" if allowed else kind


def _help(option: click.Option) -> str:
    return prose((option.help or "").replace("\b", ""))
