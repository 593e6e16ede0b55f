"""`megaback import shards`: token ids that other programs have written become shards.

The same resumable build as for text, with other readers: nanoGPT, llm.c, Megatron-LM, datatrove and
mosaicml-streaming. Ids are neither decoded nor encoded again.
"""

from pathlib import Path

import click

from data_pipeline.build.command import build_shards
from data_pipeline.build.options import (
    compression_level_option,
    deduplicate_option,
    direction_option,
    echo_manifest,
    frame_tokens_option,
    limit_documents_option,
    limit_tokens_option,
    num_workers,
    shard_tokens_option,
    tasks_option,
)
from data_pipeline.build.settings import BuildSettings
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.number_ranges import SHARE_BELOW_ALL, TOKEN_ID
from data_pipeline.common.shared_options import out_folder_option, workers_option
from data_pipeline.common.source_type import SOURCE
from data_pipeline.common.terminal import echo
from data_pipeline.errors import ConfigError
from data_pipeline.shards.manifest import SPLITS
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.tokenized.documents import ID_TYPES, TokenizedFormat
from data_pipeline.sources.tokenized.registry import train_and_val
from data_pipeline.sources.weighted import WeightedSource, on_bad_record_option
from data_pipeline.text.codec import Direction, TextCodec, Unit


@click.command(
    cls=ResumableCommand,
    name="shards",
    epilog=examples(
        "megaback import shards --source nanoGPT/data/openwebtext --out data/openwebtext "
        "--tokenizer data/gpt2/tokenizer.json",
        "megaback import shards --source corpus_text_document.bin --out data/corpus --end-id 2 "
        "--tokenizer data/tokenizer/tokenizer.model",
        "megaback import shards --source mds/train --val-source mds/val --joined --out data/mds "
        "--tokenizer data/tokenizer/tokenizer.model",
    ),
)
@click.option(
    "--source",
    "sources",
    type=SOURCE,
    required=True,
    multiple=True,
    help="Source: a file, folder or quoted pattern of .bin, .npy, .bin with .idx, .ds, or MDS. "
    "May be repeated.",
)
@click.option(
    "--val-source",
    "val_sources",
    type=SOURCE,
    multiple=True,
    help="Source of held-out documents, which become the val set. May be repeated. Default: the "
    "files with val in their names, of a folder of train and val.",
)
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="Path to the tokenizer with which the source was written.",
)
@out_folder_option
@direction_option("Reading direction of the model: backward reverses the ids of each document.")
@click.option(
    "--end-id",
    type=TOKEN_ID.option,
    help="Id between the documents of the source. Default: the tokenizer's <|endoftext|>.",
)
@click.option(
    "--begin-id",
    type=TOKEN_ID.option,
    help="Id at the beginning of documents. Default: the tokenizer's <|startoftext|>.",
)
@click.option(
    "--id-type",
    type=click.Choice(ID_TYPES),
    help="Type of ids in files that do not name it. Default: the vocabulary's in .bin, int64 in "
    "bytes columns of MDS.",
)
@click.option(
    "--column", default="tokens", show_default=True, help="Column of MDS with ids, or with text."
)
@click.option(
    "--joined",
    is_flag=True,
    help="Samples of MDS are rows of joined documents, which are cut at --end-id.",
)
@click.option(
    "--val-fraction",
    type=SHARE_BELOW_ALL.option,
    default=0.01,
    show_default=True,
    help="Fraction of documents in the val set, without a source of it.",
)
@on_bad_record_option("stop")
@max_record_bytes_option
@deduplicate_option
@limit_documents_option
@limit_tokens_option
@frame_tokens_option
@shard_tokens_option
@compression_level_option
@tasks_option
@workers_option("processes")
def main(
    sources: tuple[str, ...],
    val_sources: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    direction: str,
    end_id: int | None,
    begin_id: int | None,
    id_type: str | None,
    column: str,
    joined: bool,
    val_fraction: float,
    on_bad_record: str,
    max_record_bytes: int,
    deduplicate: bool,
    limit_documents: int | None,
    limit_tokens: int | None,
    frame_tokens: int,
    shard_tokens: int,
    compression_level: int,
    tasks: int | None,
    workers: int | None,
) -> None:
    """Import token ids that another program has written into shards.

    Ids stay as they are, the source's markers become megaback's, and the shards are read back and
    compared. Run the same command again to resume.
    """
    codec = TextCodec.load(tokenizer, Direction(direction), Unit.TOKEN)
    parts = _with_splits(sources, val_sources)
    has_val = any(part.split == "val" for part in parts)
    settings = BuildSettings(
        sources=parts,
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=direction,
        val_fraction=0.0 if has_val else val_fraction,
        frame_tokens=frame_tokens,
        shard_tokens=shard_tokens,
        compression_level=compression_level,
        on_bad_record=on_bad_record,
        deduplicate=deduplicate,
        limit_documents=limit_documents,
        limit_tokens=limit_tokens,
        max_record_bytes=max_record_bytes,
        tokenized=TokenizedFormat(
            end_id=codec.end_id if end_id is None else end_id,
            begin_id=codec.begin_id if begin_id is None else begin_id,
            flat_type=id_type or f"uint{8 * codec.id_dtype.itemsize}",
            bytes_type=id_type or "int64",
            column=column,
            joined=joined,
        ),
    )
    manifest, num_found = build_shards(settings, codec, out, num_workers(workers), tasks)
    if num_found:
        click.echo(f"{num_found} tasks were already done")
    echo_manifest(manifest, out)
    form = settings.tokenized
    num_documents = sum(manifest.total(split)["documents"] for split in SPLITS)
    is_limited = limit_documents is not None or limit_tokens is not None
    if form is not None and num_documents <= len(parts) and not is_limited:
        echo(
            f"note: no source has more than one document; if id {form.end_id} is not between "
            "theirs, give that with --end-id, and the tokenizer that wrote them"
        )


def _with_splits(
    sources: tuple[str, ...], val_sources: tuple[str, ...]
) -> tuple[WeightedSource, ...]:
    """The sources with their sets; folders of both sets as one source for each.

    Raises ConfigError when a folder has a val set, and others are given.
    """
    pairs = [train_and_val(source) for source in sources]
    if val_sources and any(pairs):
        raise ConfigError(
            "`val_source` is given, and a `source` is a folder with files of train and of val; "
            "give its files of train as `source`"
        )
    if not val_sources and not any(pairs):
        return tuple(map(WeightedSource, sources))
    train = [
        source if pair is None else pair[0] for source, pair in zip(sources, pairs, strict=True)
    ]
    val = [pair[1] for pair in pairs if pair is not None]
    return (
        *(WeightedSource(source, split="train") for source in train),
        *(WeightedSource(source, split="val") for source in (*val_sources, *val)),
    )


if __name__ == "__main__":
    main()
