"""`megaback shards select`: the documents of a data set with the best scores, as a new data set.

Scores are lines of `megaback shards score`, whose order is that of the documents. Splits without
scores are kept whole. Names of shards, order of documents, and ids stay the same. The folder
appears when it is complete.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from data_pipeline.common.atomic import replacing
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.file_hash import file_sha256
from data_pipeline.common.interrupts import require_uninterrupted
from data_pipeline.common.limits import MAX_SHARD_TOKENS, MAX_SOURCE_CHARACTERS
from data_pipeline.common.number_ranges import NUMBER, SOME_SHARE
from data_pipeline.common.output_folder import require_output_folder, whole_folder
from data_pipeline.common.output_paths import overwrite_option
from data_pipeline.common.shared_options import out_folder_option, workers_option
from data_pipeline.common.terminal import echo
from data_pipeline.errors import BadRecordError, ConfigError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet, changed_shard
from data_pipeline.shards.manifest import (
    DICTIONARY_NAME,
    SPLITS,
    Manifest,
    ShardEntry,
)
from data_pipeline.shards.traversal import on_threads
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources.jsonl import Record, read_records

_EXCLUDED_NAME = "score"
"""Name of the filter in the manifest."""

Keep = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardScores:
    """Scores of the documents of one shard, and the number of tokens that they were made from."""

    values_N: npt.NDArray[np.float64]
    tokens_N: npt.NDArray[np.uint32]


def read_scores(path: Path, key: str, manifest: Manifest) -> dict[str, ShardScores]:
    """Scores of each shard of the splits that a file of `megaback shards score` has.

    12 bytes of memory per document. Raises BadRecordError unless the lines are those of the
    documents of whole splits, in order, and SourceMissingError, SourceUnreadableError.
    """
    records = read_records(str(path))
    found: dict[str, ShardScores] = {}
    where = str(path)
    record = _next(records)
    while record is not None:
        split = record.fields.get("split")
        entries = manifest.split(split) if split in SPLITS else ()
        if not entries or entries[0].file in found:
            raise _other(record.where, f"a line of the split {split!r} is not expected here")
        number = 0
        for entry in entries:
            values, tokens = array("d"), array("I")
            for _ in range(entry.documents):
                if record is None:
                    raise _other(where, f"it ends before document {number} of {entry.file}")
                where = record.where
                value, num_tokens = _score(record, key, entry, number)
                values.append(value)
                tokens.append(num_tokens)
                number += 1
                record = _next(records)
            found[entry.file] = ShardScores(
                np.frombuffer(values, dtype=np.float64), np.frombuffer(tokens, dtype=np.uint32)
            )
    if not found:
        raise _other(where, "it has no lines")
    return found


def best(scores: Iterable[ShardScores], keep: float, *, lowest: bool) -> list[Keep]:
    """Mask of the documents in the best fraction, per shard: at least one; the first of equals.

    `lowest`: the best are those with the lowest values.
    """
    of_shards = [one.values_N for one in scores]
    values_N = np.concatenate(of_shards)
    order_N = np.argsort(values_N if lowest else -values_N, kind="stable")
    kept_N = np.zeros(len(values_N), dtype=bool)
    kept_N[order_N[: max(1, round(keep * len(values_N)))]] = True
    return np.split(kept_N, np.cumsum([len(one) for one in of_shards])[:-1])


def select(
    shards: str | Path,
    scores: Path,
    out: Path,
    keep: float,
    *,
    key: str = "quality",
    lowest: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
) -> Manifest:
    """Write the best fraction `keep` of the documents to the folder `out`; returns its manifest.

    Raises ConfigError for instruction examples or an empty split, BadRecordError for scores of
    other shards, OutputExistsError, and the errors of shards.
    """
    require_output_folder(out, (shards, scores), overwrite=overwrite)
    data_set = DataSet.open(shards)
    manifest, codec = data_set.manifest, data_set.codec()
    if manifest.row_tokens is not None:
        raise ConfigError(
            f"{data_set.name} holds instruction examples, which are packed into rows; select rows "
            "before `megaback instruct build`"
        )
    found = read_scores(scores, key, manifest)
    chosen = dict(zip(found, best(found.values(), keep, lowest=lowest), strict=True))
    _require_every_split(manifest, chosen, keep)
    num_kept = sum(int(keeps.sum()) for keeps in chosen.values())
    num_scored = sum(map(len, chosen.values()))
    which = "lowest" if lowest else "highest"
    note = (
        f" ({num_kept} of {num_scored} documents, those with the {which} {key} in scores with "
        f"sha256 {file_sha256(scores)})"
    )
    if len(manifest.source) + len(note) > MAX_SOURCE_CHARACTERS:
        raise ConfigError(
            f"the source of {data_set.name} has {len(manifest.source):,} characters, which leaves "
            "no room to name the scores; build the shards from fewer sources"
        )
    with whole_folder(out, overwrite=overwrite) as folder:
        work = _Copier(data_set, folder, codec.piece_num_bytes())
        left = [
            entry
            for entry in manifest.shards
            if entry.file not in chosen or chosen[entry.file].any()
        ]
        made = dict(
            on_threads(
                lambda entry: work.copy(entry, found.get(entry.file), chosen.get(entry.file)),
                left,
                workers,
                "selecting",
            )
        )
        files = {codec.file_name: codec.model_bytes, DICTIONARY_NAME: data_set.require_dictionary()}
        for name, content in files.items():
            if content is not None:
                with replacing(folder / name) as file:
                    file.write(content)
        excluded = manifest.excluded.get(_EXCLUDED_NAME, 0) + num_scored - num_kept
        selected = replace(
            manifest,
            source=manifest.source + note,
            excluded={**manifest.excluded, _EXCLUDED_NAME: excluded},
            shards=tuple(made[entry] for entry in manifest.shards if entry in made),
        )
        selected.save(folder)
    return selected


def _require_every_split(manifest: Manifest, chosen: dict[str, Keep], keep: float) -> None:
    """Raises ConfigError if no document of a split is among the best of all."""
    for split in SPLITS:
        files = [entry.file for entry in manifest.split(split)]
        if files and all(file in chosen and not chosen[file].any() for file in files):
            raise ConfigError(
                f"no {split} document is among the best {keep:g} of all scored ones, so the new "
                f"data set would have no {split} set; keep a larger fraction, or give the scores "
                "of one split only: the other is then kept whole"
            )


@dataclass(frozen=True)
class _Copier:
    """Writes shards to a folder, without the documents that are not kept."""

    data_set: DataSet
    folder: Path
    piece_num_bytes: npt.NDArray[np.int64]

    def copy(self, entry: ShardEntry, scores: ShardScores | None, keep: Keep | None) -> ShardEntry:
        """Write a shard, whole without scores. Raises ShardCorruptError, BadRecordError."""
        manifest = self.data_set.manifest
        compression = Compression(dictionary=self.data_set.require_dictionary())
        with (
            self.data_set.open_shard(entry) as reader,
            replacing(self.folder / entry.file) as file,
        ):
            writer = ShardWriter(
                file,
                manifest.text_format.to_dict(),
                reader.id_dtype,
                manifest.frame_tokens,
                compression,
            )
            if scores is None or keep is None:
                writer.add_shard(reader)
            else:
                if not np.array_equal(reader.document_tokens() - 1, scores.tokens_N):
                    raise BadRecordError(
                        f"the scores are of other documents than those of {reader.shown}, which "
                        "have other numbers of tokens; score this data set by `megaback shards "
                        "score`"
                    )
                for ids, is_kept in zip(reader.documents(), keep.tolist(), strict=True):
                    require_uninterrupted()
                    if is_kept:
                        writer.add(ids, int(self.piece_num_bytes[ids].sum()))
            made = ShardEntry(entry.file, entry.split, **asdict(writer.finish()))
            is_whole = made.documents == entry.documents
            if is_whole and made.content_sha256 != entry.content_sha256:
                raise changed_shard(reader)
        return made


def _score(record: Record, key: str, entry: ShardEntry, number: int) -> tuple[float, int]:
    """Value and number of tokens of a line. Raises BadRecordError."""
    fields = record.fields
    place = (fields.get("split"), fields.get("shard"), fields.get("document"))
    if place != (entry.split, entry.file, number):
        raise _other(
            record.where, f"document {number} of {entry.split}, in {entry.file}, must be here"
        )
    if key not in fields:
        raise BadRecordError(
            f"{record.where}: no {key!r}; choose another `key`, of {', '.join(fields)}"
        )
    value, num_tokens = fields[key], fields.get("tokens")
    if isinstance(value, bool) or NUMBER.problem(value) is not None:
        raise BadRecordError(f"{record.where}: {key!r} is not a finite number; fix the line")
    if not isinstance(num_tokens, int) or not 0 <= num_tokens < MAX_SHARD_TOKENS:
        raise _other(record.where, "'tokens' is not a number of tokens")
    return float(value), num_tokens


def _next(records: Iterator[Record | BadRecordError]) -> Record | None:
    """The next record; None at the end. Raises BadRecordError for a malformed one."""
    record = next(records, None)
    if isinstance(record, BadRecordError):
        raise record
    return record


def _other(where: str, problem: str) -> BadRecordError:
    return BadRecordError(
        f"{where}: {problem}; give the scores that `megaback shards score` wrote for this data set"
    )


@click.command(
    cls=WorkCommand,
    name="select",
    epilog=examples(
        "megaback shards select data/prose --scores quality.jsonl --keep-fraction 0.5 "
        "--out data/best",
        "megaback shards select data/prose --scores quality.jsonl.gz --keep-fraction 0.3 "
        "--key forward_per_token --lowest --out data/likeliest",
    ),
)
@click.argument("shards", type=click.Path())
@click.option(
    "--scores",
    required=True,
    type=click.Path(path_type=Path),
    help="Scores that `megaback shards score` wrote, also compressed (.gz, .zst, .bz2, .xz).",
)
@click.option(
    "--keep-fraction",
    "keep",
    required=True,
    type=SOME_SHARE.option,
    help="Fraction of the documents to keep.",
)
@click.option(
    "--key",
    default="quality",
    show_default=True,
    help="Key of the scores that documents are ranked by.",
)
@click.option("--lowest", is_flag=True, help="Keep the lowest values instead of the highest.")
@out_folder_option
@overwrite_option
@workers_option("threads")
def main(
    shards: str,
    scores: Path,
    keep: float,
    key: str,
    lowest: bool,
    out: Path,
    overwrite: bool,
    workers: int | None,
) -> None:
    """Write the documents of the data set SHARDS with the highest quality as a new data set.

    Splits without scores are kept whole.
    """
    selected = select(
        *(shards, scores, out, keep),
        key=key,
        lowest=lowest,
        overwrite=overwrite,
        workers=workers,
    )
    for split in SPLITS:
        total = selected.total(split)
        echo(f"{split:<12} {total['documents']:,} documents, {total['tokens']:,} tokens")
    echo(f"fingerprint  {selected.fingerprint}")


if __name__ == "__main__":
    main()
