"""Options that commands of several packages share: a name has one meaning and one declaration.

Other shared options: `overwrite_option` in `output_paths`, the options of sources in
`sources.record_limits` and `sources.weighted`, those of a build in `build.options`, and those of a
model in `tools.model_options`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from data_pipeline.common.number_ranges import COUNT, MANY, Range

_Function = TypeVar("_Function", bound=Callable[..., Any])

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON instead of text."
)
out_folder_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
save_before_option = click.option(
    "--save-before",
    metavar="TIME",
    help="Save and stop before a time (2026-11-25T18:00) or within a duration (1h30m).",
)
hostfile_option = click.option(
    "--hostfile",
    type=click.Path(path_type=Path),
    help="Train on the hosts of this file, over ssh: one line `NAME slots=N` per host.",
)

example_columns_option = click.option(
    "--columns",
    default="",
    help="Columns with other names: instruction=prompt,output=answer or messages=chat.",
)


def limit_option(
    items: str, default: int | None = None, allowed: Range = COUNT
) -> Callable[[_Function], _Function]:
    """`--limit`: the maximum number of `items` that a command reads."""
    return click.option(
        "--limit",
        type=allowed.option,
        default=default,
        show_default=default is not None,
        help=f"Maximum number of {items}." + (" Default: all." if default is None else ""),
    )


def workers_option(kind: str) -> Callable[[_Function], _Function]:
    """`--workers`; `kind` is `processes` or `threads`."""
    return click.option(
        "--workers", type=MANY.option, help=f"Number of {kind}. Default: one per core."
    )
