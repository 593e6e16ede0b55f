"""`megaback instruct build`: encodes instructions and responses into shards for fine-tuning.

The same resumable build as for documents, with another reader of records, BackChat's format, and
rows that no example crosses.
"""

from pathlib import Path

import click

from data_pipeline.build.command import build_shards
from data_pipeline.build.options import (
    compression_level_option,
    direction_option,
    echo_manifest,
    frame_tokens_option,
    num_workers,
    tasks_option,
    unit_option,
)
from data_pipeline.build.settings import BuildSettings
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.number_ranges import ROW_TOKENS, SHARE_BELOW_ALL
from data_pipeline.common.shared_options import (
    example_columns_option,
    out_folder_option,
    workers_option,
)
from data_pipeline.common.source_type import SOURCE
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.weighted import WeightedSource, on_bad_record_option
from data_pipeline.text.codec import Direction, TextCodec, Unit

DEFAULT_SOURCE = "hf:hakurei/open-instruct-v1"


@click.command(
    cls=ResumableCommand,
    name="build",
    epilog=examples(
        "megaback instruct build --out data/open-instruct --tokenizer "
        "data/tokenizer/tokenizer.model",
        "megaback instruct build --source chats.jsonl --val-source held-out.jsonl "
        "--columns messages=conversations --out data/chats --tokenizer "
        "data/tokenizer/tokenizer.model",
    ),
)
@click.option(
    "--source",
    "sources",
    type=SOURCE,
    multiple=True,
    default=(DEFAULT_SOURCE,),
    show_default=True,
    help="Source: a path, pattern or URL of jsonl or parquet; or hf:NAME[:CONFIG]. May be "
    "repeated.",
)
@click.option(
    "--val-source",
    "val_sources",
    type=SOURCE,
    multiple=True,
    help="Source of held-out examples, which become the val set. May be repeated.",
)
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="Path to the base model's tokenizer.model or tokenizer.json.",
)
@out_folder_option
@direction_option(
    "Direction of the model: backward writes the instruction for a response; forward, the response."
)
@unit_option("Unit that is reversed: ids, or words before encoding; that of the base model.")
@click.option(
    "--context-tokens",
    type=ROW_TOKENS.option,
    default=1024,
    show_default=True,
    help="Length of a row, in tokens. Several examples share a row, and none is split; longer "
    "ones are excluded.",
)
@example_columns_option
@click.option(
    "--val-fraction",
    type=SHARE_BELOW_ALL.option,
    default=0.01,
    show_default=True,
    help="Fraction of examples in the val set, without --val-source.",
)
@on_bad_record_option("skip")
@max_record_bytes_option
@frame_tokens_option
@compression_level_option
@tasks_option
@workers_option("processes")
def main(
    sources: tuple[str, ...],
    val_sources: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    direction: str,
    unit: str,
    context_tokens: int,
    columns: str,
    val_fraction: float,
    on_bad_record: str,
    max_record_bytes: int,
    frame_tokens: int,
    compression_level: int,
    tasks: int | None,
    workers: int | None,
) -> None:
    """Encode instructions and responses into shards for fine-tuning.

    Records hold instruction, input and output, or the messages of a chat. Run the same
    command again to resume.
    """
    codec = TextCodec.load(tokenizer, Direction(direction), Unit(unit))
    split = "train" if val_sources else None
    settings = BuildSettings(
        sources=(
            *(WeightedSource(source, split=split) for source in sources),
            *(WeightedSource(source, split="val") for source in val_sources),
        ),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=direction,
        unit=unit,
        val_fraction=0.0 if val_sources else val_fraction,
        frame_tokens=frame_tokens,
        compression_level=compression_level,
        on_bad_record=on_bad_record,
        max_record_bytes=max_record_bytes,
        examples=ExampleColumns.parse(columns),
        row_tokens=context_tokens,
    )
    manifest, num_found = build_shards(settings, codec, out, num_workers(workers), tasks)
    if num_found:
        click.echo(f"{num_found} tasks were already done")
    echo_manifest(manifest, out)


if __name__ == "__main__":
    main()
