"""`megaback shards inspect`: shows the contents of a data set, or one document as text."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from data_pipeline.common.command import Command, examples
from data_pipeline.common.figures import require_matplotlib, require_png
from data_pipeline.common.number_ranges import COUNT_OR_ZERO
from data_pipeline.common.output_paths import is_our_picture, overwrite_option, require_output
from data_pipeline.common.shared_options import json_option, workers_option
from data_pipeline.common.terminal import echo
from data_pipeline.errors import ConfigError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.document_lengths import DocumentLengths, describe, read_document_lengths
from data_pipeline.shards.excluded import echo_excluded
from data_pipeline.shards.length_plot import NEEDED_BY, draw_histogram
from data_pipeline.shards.manifest import SPLITS, Manifest, ShardEntry
from data_pipeline.shards.traversal import num_frames, on_threads, spread_frames
from data_pipeline.sources.skipped import skipped_to_json

_MAX_FRAMES = 4096
_MAX_TOKENS = 1 << 28
_MAX_DOCUMENT_TOKENS = 1 << 24


@dataclass(frozen=True)
class UnigramEntropy:
    """Entropy in nats per token, and the number of frames that it was measured on."""

    nats: float
    frames: int
    of_frames: int


def document_at(data_set: DataSet, split: str, number: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The ids of one document, counted from 0. Raises ConfigError past the split's end."""
    before = 0
    for entry in data_set.manifest.split(split):
        if number < before + entry.documents:
            with data_set.open_shard(entry) as reader:
                stops = np.cumsum(reader.document_tokens())
                stop = int(stops[number - before])
                start = int(stops[number - before - 1]) if number > before else 0
                if stop - start > _MAX_DOCUMENT_TOKENS:
                    raise ConfigError(
                        f"`document` {number} has {stop - start:,} tokens, more than the "
                        f"{_MAX_DOCUMENT_TOKENS:,} that can be shown; choose another one"
                    )
                return reader.tokens(start, stop)
        before += entry.documents
    raise ConfigError(
        f"`document` is {number}, but the {split} set has {before} documents; they are counted "
        "from 0"
    )


def unigram_entropy(data_set: DataSet, split: str) -> float:
    """Entropy of a split's tokens in nats per token: the loss of the best model without context.

    Begin markers are excluded: they are never predicted.
    """
    return sampled_entropy(data_set, split, max_frames=None).nats


def sampled_entropy(
    data_set: DataSet,
    split: str,
    max_frames: int | None,
    workers: int | None = None,
) -> UnigramEntropy:
    """Unigram entropy on at most `max_frames`, spread evenly over the split; None is all."""

    manifest = data_set.manifest

    def count(part: tuple[ShardEntry, list[int]]) -> npt.NDArray[np.int64]:
        entry, frames = part
        counts = np.zeros(manifest.vocab_size, dtype=np.int64)
        with data_set.open_shard(entry) as reader:
            for frame in frames:
                of_frame = np.bincount(reader.frame(frame))
                counts[: len(of_frame)] += of_frame
        return counts

    spread = spread_frames(manifest, split, max_frames)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for _, of_shard in on_threads(count, spread, workers, f"{split} tokens"):
        counts += of_shard
    counts[manifest.begin_id] = 0
    probabilities = counts[counts > 0] / counts.sum()
    return UnigramEntropy(
        nats=float(-(probabilities * np.log(probabilities)).sum()),
        frames=sum(len(frames) for _, frames in spread),
        of_frames=sum(num_frames(manifest, entry) for entry in manifest.split(split)),
    )


@dataclass(frozen=True)
class SplitSummary:
    """Sums, unigram entropy and document lengths of a split that is not empty."""

    total: dict[str, int]
    entropy: UnigramEntropy
    lengths: DocumentLengths

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.total,
            "unigram_entropy": vars(self.entropy),
            "document_tokens": self.lengths.to_dict(),
        }


def summarize(data_set: DataSet, split: str, workers: int | None) -> SplitSummary:
    """Read the lengths of all documents and the tokens of a sample of frames."""
    manifest = data_set.manifest
    max_frames = min(_MAX_FRAMES, max(1, _MAX_TOKENS // manifest.frame_tokens))
    return SplitSummary(
        manifest.total(split),
        sampled_entropy(data_set, split, max_frames, workers),
        read_document_lengths(data_set, split, workers),
    )


def _show_document(data_set: DataSet, split: str, number: int, form: str) -> None:
    codec = data_set.codec()
    ids = document_at(data_set, split, number)
    pieces = [codec.piece(piece_id) for piece_id in ids.tolist()]
    if form == "ids":
        click.echo(" ".join(map(str, ids.tolist())))
    elif form == "stored":
        click.echo(" ".join(pieces))
    elif form == "json":
        text = codec.render(ids)
        fields = {"split": split, "document": number, "tokens": len(ids), "text": text}
        click.echo(json.dumps({**fields, "ids": ids.tolist(), "pieces": pieces}))
    else:
        click.echo(codec.render(ids).encode("utf-8", "surrogatepass"), nl=False)


def data_set_facts(shards: Path, manifest: Manifest) -> dict[str, Any]:
    """Source, format and hashes of a data set."""
    text_format = manifest.text_format
    return {
        "data_set": str(shards),
        "source": manifest.source,
        **text_format.to_dict(),
        "vocab_size": manifest.vocab_size,
        "id_bytes": manifest.id_bytes,
        "frame_tokens": manifest.frame_tokens,
        "dictionary_sha256": manifest.dictionary_sha256,
        "fingerprint": manifest.fingerprint,
    }


def _show_facts(facts: dict[str, Any]) -> None:
    echo(f"data set     {facts['data_set']}")
    echo(f"source       {facts['source']}")
    echo(f"direction    {facts['direction']}, unit {facts['unit']}")
    echo(f"tokenizer    {facts['vocab_size']:,} pieces, sha256 {facts['tokenizer_sha256'][:16]}")
    echo(f"frames       {facts['frame_tokens']:,} tokens")
    if facts["dictionary_sha256"]:
        echo(f"dictionary   sha256 {facts['dictionary_sha256'][:16]}")
    echo(f"fingerprint  {facts['fingerprint']}")


def _show_split(name: str, summary: SplitSummary, id_bytes: int) -> None:
    total, entropy = summary.total, summary.entropy
    sampled = (
        f", estimated on {entropy.frames:,} of {entropy.of_frames:,} frames"
        if entropy.frames < entropy.of_frames
        else ""
    )
    echo(
        f"{name:<12} {total['shards']} shards, {total['documents']:,} documents, "
        f"{total['tokens']:,} tokens; {total['text_bytes'] / total['tokens']:.2f} bytes of "
        f"text per token, files at {total['file_bytes'] / (total['tokens'] * id_bytes):.2f} of the "
        f"raw ids; unigram entropy {entropy.nats:.3f} nats ({entropy.nats / math.log(2):.2f} bits) "
        f"per token{sampled}"
    )


@click.command(
    cls=Command,
    name="inspect",
    epilog=examples(
        "megaback shards inspect data/fineweb-100bt",
        "megaback shards inspect data/fineweb-100bt --split val --document 3",
        "megaback shards inspect data/fineweb-100bt --plot lengths.png",
    ),
)
@click.argument("shards", type=click.Path(path_type=Path))
@click.option(
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Split to show."
)
@click.option(
    "--document", type=COUNT_OR_ZERO.option, help="Index of a document to show, in the split."
)
@click.option(
    "--stored", "form", flag_value="stored", help="Show the pieces of --document, in stored order."
)
@click.option(
    "--ids", "form", flag_value="ids", help="Show the ids of --document, in stored order."
)
@json_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PNG file to write a histogram of the split's document lengths to.",
)
@overwrite_option
@workers_option("threads")
def main(
    shards: Path,
    split: str,
    document: int | None,
    form: str | None,
    as_json: bool,
    plot: Path | None,
    overwrite: bool,
    workers: int | None,
) -> None:
    """Show the contents of the data set SHARDS, or one of its documents."""
    data_set = DataSet.open(shards)
    manifest = data_set.manifest
    if document is not None:
        if plot is not None:
            raise ConfigError("--plot draws all documents; omit --document")
        _show_document(data_set, split, document, "json" if as_json else form or "text")
        return
    if form in ("stored", "ids"):
        raise ConfigError(f"--{form} shows one document; choose it with --document")
    if plot is not None:
        require_png(plot)
        require_output(
            plot,
            (shards,),
            is_ours=is_our_picture,
            overwrite=overwrite,
            option="--plot",
        )
        require_matplotlib(*NEEDED_BY)
        if not manifest.split(split):
            raise ConfigError(
                f"--plot has nothing to draw: the {split} set is empty; choose another --split"
            )
    summaries = {
        name: summarize(data_set, name, workers)
        for name in SPLITS
        if manifest.total(name)["tokens"]
    }
    facts = data_set_facts(shards, manifest)
    if as_json:
        splits = {name: summary.to_dict() for name, summary in summaries.items()}
        excluded = {
            "excluded": manifest.excluded,
            "skipped": skipped_to_json(manifest.skipped),
        }
        click.echo(json.dumps({**facts, **excluded, "splits": splits}))
    else:
        _show_facts(facts)
        for name in SPLITS:
            if name in summaries:
                _show_split(name, summaries[name], manifest.id_bytes)
            else:
                click.echo(f"{name:<12} empty")
        echo_excluded(manifest)
        if split in summaries:
            echo(f"\nlengths of the {split} documents in tokens, markers included")
            echo("\n".join(describe(summaries[split].lengths)))
    if plot is not None:
        lengths = summaries[split].lengths
        title = (
            f"Lengths of documents in {shards.resolve().name}, {split} set: "
            f"{lengths.num_documents:,} documents, {lengths.tokens:,} tokens"
        )
        draw_histogram(lengths, title, plot, overwrite=overwrite)
        click.echo(f"plot         {plot}", err=as_json)


if __name__ == "__main__":
    main()
