"""`megaback config`: a config with its defaults, and the meaning of its keys."""

import json
from dataclasses import asdict
from pathlib import Path

import click
import yaml

from data_pipeline.common.command import Command, examples
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo
from megaback.config_file import load_config
from megaback.config_reference import ConfigKey, ConfigPart, matching_parts
from megaback.shown_config import shown_config


def _explain(parts: list[ConfigPart]) -> None:
    for number, part in enumerate(parts):
        if number:
            click.echo()
        if part.description:
            echo(f"{part.name}  {part.description}")
        for one in part.keys:
            click.echo(f"\n{one.key}" if part.description or one is not part.keys[0] else one.key)
            echo(f"    {_values(one)}")
            echo(f"    {one.description}")


def _values(one: ConfigKey) -> str:
    values = ("list of " if one.is_list else "") + ", ".join(value.text for value in one.values)
    default = "null" if one.default == "" else one.default
    return f"{values}; " + ("required" if default is None else f"default {default}")


def _as_json(parts: list[ConfigPart]) -> str:
    keys = {
        one.key: asdict(one) | {"values": [value.text for value in one.values]}
        for part in parts
        for one in part.keys
    }
    for fields in keys.values():
        fields["required"] = fields["default"] is None
        del fields["key"]
    return json.dumps(keys, indent=2)


@click.command(
    cls=Command,
    name="config",
    epilog=examples(
        "megaback config --explain optimizer.learning_rate",
        "megaback config --explain zero",
        "megaback config configs/demo.yaml training.steps=200",
    ),
)
@click.argument("words", nargs=-1, metavar="[CONFIG [OVERRIDES]... | KEYS...]")
@click.option(
    "--explain",
    "must_explain",
    is_flag=True,
    help="Explain keys or sections: values, range, default, meaning. Without a key: all.",
)
@json_option
def main(words: tuple[str, ...], must_explain: bool, as_json: bool) -> None:
    """Show CONFIG as a run would use it, with all defaults; or explain keys with --explain.

    Secrets of URLs are not shown.
    """
    if must_explain:
        parts = [part for key in words or (None,) for part in matching_parts(key)]
        if as_json:
            click.echo(_as_json(parts))
        else:
            _explain(parts)
        return
    if not words:
        raise click.UsageError("Give a CONFIG, or --explain.")
    fields = shown_config(load_config(Path(words[0]), words[1:]))
    click.echo(
        json.dumps(fields, indent=2)
        if as_json
        else yaml.safe_dump(fields, sort_keys=False).rstrip()
    )


if __name__ == "__main__":
    main()
