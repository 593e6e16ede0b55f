"""Options that the build commands share, and their report of a finished data set."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from data_pipeline.build.settings import CHANGEABLE, BuildSettings
from data_pipeline.build.train_command import train_commands
from data_pipeline.build.val_hashes import MIN_VAL_DOCUMENTS
from data_pipeline.common.next_command import show_next
from data_pipeline.common.number_ranges import (
    COUNT,
    FRAME_TOKENS,
    LEVEL,
    MANY,
    NUMBER,
    SHARE_BELOW_ALL,
    SOURCE_WEIGHT,
)
from data_pipeline.common.source_type import SOURCE
from data_pipeline.common.terminal import echo
from data_pipeline.shards.compression import DEFAULT_LEVEL
from data_pipeline.shards.excluded import echo_excluded, noun_of
from data_pipeline.shards.manifest import SPLITS, Manifest
from data_pipeline.shards.writer import DEFAULT_FRAME_TOKENS
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.weighted import on_bad_record_option, weighted_sources
from data_pipeline.text.codec import Direction, TextCodec, Unit

_Function = TypeVar("_Function", bound=Callable[..., Any])

html_option = click.option(
    "--html", is_flag=True, help="Also read HTML pages: their main text, extracted by trafilatura."
)

text_column_option = click.option(
    "--text-column", default="text", show_default=True, help="Column or key with the text."
)
frame_tokens_option = click.option(
    "--frame-tokens",
    type=FRAME_TOKENS.option,
    default=DEFAULT_FRAME_TOKENS,
    show_default=True,
    help="Number of tokens per frame, a power of two.",
)
compression_level_option = click.option(
    "--compression-level",
    type=LEVEL.option,
    default=DEFAULT_LEVEL,
    show_default=True,
    help="Compression level of zstd: higher is smaller and slower to write.",
)
deduplicate_option = click.option(
    "--deduplicate",
    is_flag=True,
    help="Remove exact duplicates; uses twice the disk space until the build ends.",
)
limit_documents_option = click.option(
    "--limit-documents",
    type=COUNT.option,
    help="Maximum number of documents; the first ones are kept. Default: all.",
)
limit_tokens_option = click.option(
    "--limit-tokens",
    type=COUNT.option,
    help="Maximum total number of tokens; the first documents are kept. Default: all.",
)
shard_tokens_option = click.option(
    "--shard-tokens",
    type=COUNT.option,
    default=1 << 26,
    show_default=True,
    help="Target number of tokens per shard; documents are never split.",
)


def direction_option(what: str) -> Callable[[_Function], _Function]:
    """`--direction`; `what` is its help."""
    directions = [direction.value for direction in Direction]
    return click.option(
        "--direction",
        type=click.Choice(directions),
        default=Direction.BACKWARD.value,
        show_default=True,
        help=what,
    )


def unit_option(what: str) -> Callable[[_Function], _Function]:
    """`--unit`; `what` is its help."""
    return click.option(
        "--unit",
        type=click.Choice([unit.value for unit in Unit]),
        default=Unit.TOKEN.value,
        show_default=True,
        help=what,
    )


def sources_option(*, required: bool = False) -> Callable[[_Function], _Function]:
    """`--source`, once per source."""
    return click.option(
        "--source",
        "sources",
        type=SOURCE,
        required=required,
        multiple=True,
        help="Source: novels, pydocs, a path, pattern, URL or hf:NAME[:CONFIG]. May be repeated.",
    )


# The option of each setting, in the order of the help.
_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "sources": sources_option(),
    "weights": click.option(
        "--weight",
        "weights",
        type=SOURCE_WEIGHT.option,
        multiple=True,
        help="Number of times that each document of a --source is used; give one --weight per "
        "--source, in the same order. Default: 1.",
    ),
    "tokenizer": click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="Path to the tokenizer.model or tokenizer.json to encode with.",
    ),
    "direction": direction_option(
        "Reading direction of the model: from the text's end, or from its beginning."
    ),
    "unit": unit_option("Unit that is reversed: ids, or words before encoding."),
    "val_fraction": click.option(
        "--val-fraction",
        type=SHARE_BELOW_ALL.option,
        default=0.01,
        show_default=True,
        help="Fraction of documents in the val set.",
    ),
    "text_column": text_column_option,
    "html": html_option,
    "languages": click.option(
        "--language",
        "languages",
        multiple=True,
        help="Language of the documents to keep, as in --language-column (en). May be repeated. "
        "Default: all.",
    ),
    "min_language_score": click.option(
        "--min-language-score",
        type=NUMBER.option,
        help="Minimum language score of a document, in the units of --language-score-column. "
        "Default: no limit.",
    ),
    "language_column": click.option(
        "--language-column",
        default="language",
        show_default=True,
        help="Column or key with the language.",
    ),
    "language_score_column": click.option(
        "--language-score-column",
        default="language_score",
        show_default=True,
        help="Column or key with the language score.",
    ),
    "min_characters": click.option(
        "--min-characters",
        type=COUNT.option,
        default=1,
        show_default=True,
        help="Minimum length of a document, in characters.",
    ),
    "max_characters": click.option(
        "--max-characters",
        type=COUNT.option,
        help="Maximum length of a document, in characters. Default: no limit.",
    ),
    "on_bad_record": on_bad_record_option("stop"),
    "max_record_bytes": max_record_bytes_option,
    "deduplicate": deduplicate_option,
    "limit_documents": limit_documents_option,
    "limit_tokens": limit_tokens_option,
    "frame_tokens": frame_tokens_option,
    "shard_tokens": shard_tokens_option,
    "compression_level": compression_level_option,
}

tasks_option = click.option(
    "--tasks",
    type=MANY.option,
    help="Number of tasks to split the input into. Default: by its size.",
)


def settings_options(function: _Function) -> _Function:
    """Add every option that decides the bytes of a data set to a command."""
    for option in reversed(_SETTINGS.values()):
        function = option(function)
    return function


def settings_from(options: dict[str, Any]) -> tuple[BuildSettings, TextCodec]:
    """The settings that the options give, and the codec. Raises ConfigError, TokenizerError."""
    if not options["sources"] or options["tokenizer"] is None:
        raise click.UsageError("Give --source and --tokenizer.")
    codec = TextCodec.load(
        options["tokenizer"], Direction(options["direction"]), Unit(options["unit"])
    )
    settings = BuildSettings(
        sources=weighted_sources(options["sources"], options["weights"]),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        **{
            name: value
            for name, value in options.items()
            if name not in ("sources", "weights", "tokenizer")
        },
    )
    return settings, codec


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def require_no_settings(ctx: click.Context) -> None:
    """Check that no option gives a setting of the plan. Raises click.UsageError.

    Options of CHANGEABLE are allowed, as they decide no byte of the output.
    """
    given = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in _SETTINGS
        and parameter.name not in CHANGEABLE
        and is_given(ctx, parameter.name)
    ]
    if given:
        raise click.UsageError(
            f"{given[0]} was set when the build was planned: omit it, or give --source, "
            "--tokenizer and all other options of the plan too."
        )


def num_workers(workers: int | None) -> int:
    return workers or len(os.sched_getaffinity(0))


def echo_manifest(manifest: Manifest, out: Path) -> None:
    """Print a summary of a finished data set, and the next command."""
    noun = noun_of(manifest)
    for split in SPLITS:
        total = manifest.total(split)
        echo(
            f"{split}: {total['documents']:,} {noun}, {total['tokens']:,} tokens, "
            f"{total['text_bytes']:,} bytes of text in {total['shards']} shards "
            f"of {total['file_bytes']:,} bytes"
        )
        if manifest.row_tokens is not None and total["tokens"]:
            echo(
                f"  in {total['tokens'] // manifest.row_tokens:,} rows of {manifest.row_tokens:,}: "
                f"{total['loss_tokens']:,} tokens with loss, "
                f"{total['padding_tokens'] / total['tokens']:.1%} padding"
            )
    echo_excluded(manifest)
    if manifest.requested_val_fraction is not None:
        echo(
            f"--val-fraction was raised from {manifest.requested_val_fraction:g} to "
            f"{manifest.val_fraction:.3g}: a val set has at least {MIN_VAL_DOCUMENTS} {noun}, or a "
            f"tenth of all if there are fewer than {10 * MIN_VAL_DOCUMENTS}"
        )
    if not manifest.split("val"):
        echo(f"the val set is empty: raise --val-fraction or add {noun} to measure val loss")
    echo(f"fingerprint {manifest.fingerprint[:16]} in {out}")
    show_next(train_commands(out, manifest))
