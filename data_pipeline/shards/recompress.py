"""`megaback shards recompress`: the same ids and documents in smaller, or faster, files.

Only files change: contents, and so the fingerprint and the order of training, stay. Every frame's
checksum and every shard's content hash are verified. After a kill the same command resumes, and the
result has the same bytes with any number of workers. The manifest is written last.
"""

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import zstandard

from data_pipeline.common.atomic import replacing, write_text
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.differences import differing_keys, shown_values
from data_pipeline.common.file_names import path_within
from data_pipeline.common.limits import MAX_DICTIONARY_BYTES
from data_pipeline.common.number_ranges import DICTIONARY_BYTES, LEVEL
from data_pipeline.common.output_paths import require_apart
from data_pipeline.common.own_files import unfinished_in
from data_pipeline.common.regular_files import read_file, require_no_link
from data_pipeline.common.shared_options import out_folder_option, workers_option
from data_pipeline.errors import ConfigError, OutputExistsError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet, changed_shard
from data_pipeline.shards.manifest import (
    DICTIONARY_NAME,
    FILE_NAME,
    MANIFEST_NAME,
    SHARD_NAME,
    SPLITS,
    Manifest,
    ShardEntry,
)
from data_pipeline.shards.traversal import on_threads, spread_frames
from data_pipeline.shards.writer import ShardWriter

WORK_FOLDER = ".recompress"

_SETTINGS_NAME = "settings.json"
_RECORD_NAME = re.compile(rf"({SHARD_NAME.pattern}|settings)\.json")
"""Names of the files in WORK_FOLDER."""
_SAMPLE_FRAMES = 256
_SAMPLE_BYTES = 256 << 20
"""Size in bytes of the sample that a dictionary is trained on, which is held in memory."""
_DEFAULT_LEVEL = 9


@dataclass(frozen=True)
class RecompressSettings:
    """Settings that, with the contents of the shards, decide the bytes of the output."""

    fingerprint: str
    level: int
    long_distance: bool
    dictionary_bytes: int | None


def recompress(
    shards: Path,
    out: Path,
    compression: Compression,
    dictionary_bytes: int | None = None,
    workers: int | None = None,
) -> tuple[Manifest, int]:
    """Write the shards of a data set to `out` with another compression, or resume.

    With `dictionary_bytes`, a dictionary of at most that size is trained on frames of the train
    set. Returns the new manifest and the number of shards that were already done. Raises
    OutputExistsError when `out` holds something else, ShardCorruptError for a damaged shard, and
    ConfigError when there is too little to train a dictionary on.
    """
    data_set = DataSet.open(shards)
    manifest, codec = data_set.manifest, data_set.codec()
    settings = RecompressSettings(
        manifest.fingerprint, compression.level, compression.long_distance, dictionary_bytes
    )
    was_there = out.exists()
    _claim_folder(out, shards, settings)
    try:
        if dictionary_bytes is not None:
            dictionary = _stored_dictionary(data_set, out, dictionary_bytes)
            compression = replace(compression, dictionary=dictionary)
        work = _Work(data_set, out, compression)
        done = {entry: made for entry in manifest.shards if (made := work.finished(entry))}
        num_found = len(done)
        waiting = [entry for entry in manifest.shards if entry not in done]
        done |= on_threads(work.do, waiting, workers, "recompressing")
        _remove_strays(out, manifest)
        with replacing(out / codec.file_name) as file:
            file.write(codec.model_bytes)
        recompressed = replace(
            manifest,
            shards=tuple(done[entry] for entry in manifest.shards),
            dictionary_sha256=compression.dictionary_sha256,
        )
        recompressed.save(out)
    except BaseException:
        _forget_if_nothing_is_done(out, was_there)
        raise
    return recompressed, num_found


def train_dictionary(frames: list[bytes], dictionary_bytes: int) -> bytes:
    """A zstd dictionary of at most this size for such frames: the same for the same frames.

    Raises ConfigError when they are too few or too small.
    """
    try:
        return zstandard.train_dictionary(dictionary_bytes, [*frames]).as_bytes()
    except zstandard.ZstdError as error:
        raise ConfigError(
            f"`dictionary_bytes` is {dictionary_bytes}, but zstd cannot train a dictionary of that "
            f"size on {len(frames)} frames of {sum(map(len, frames))} bytes ({error}); "
            "omit it, or use a smaller size or a larger data set"
        ) from None


class _Work:
    """Rewrites shards, each with a record so that it is not rewritten again on resume."""

    def __init__(self, data_set: DataSet, out: Path, compression: Compression) -> None:
        self._data_set = data_set
        self._out = out
        self._compression = compression

    def finished(self, entry: ShardEntry) -> ShardEntry | None:
        """The rewritten shard, if it has a valid record and its file has the recorded size."""
        try:
            record = read_json(self._record_path(entry))
            made = ShardEntry.from_json(record["shard"])
            path = path_within(self._out, made.file)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        contents = replace(entry, file_bytes=made.file_bytes, file_sha256=made.file_sha256)
        is_whole = path.is_file() and path.stat().st_size == made.file_bytes
        is_this = record.get("work") == self._sha256(entry) and made == contents
        return made if is_whole and is_this else None

    def do(self, entry: ShardEntry) -> ShardEntry:
        """Rewrite one shard. Raises ShardCorruptError and OSError."""
        manifest = self._data_set.manifest
        with (
            self._data_set.open_shard(entry) as reader,
            replacing(self._out / entry.file) as file,
        ):
            writer = ShardWriter(
                file,
                manifest.text_format.to_dict(),
                reader.id_dtype,
                manifest.frame_tokens,
                self._compression,
                manifest.row_tokens,
            )
            writer.add_shard(reader)
            made = ShardEntry(entry.file, entry.split, **asdict(writer.finish()))
            if made.content_sha256 != entry.content_sha256:
                raise changed_shard(reader)
        record = {"work": self._sha256(entry), "shard": asdict(made)}
        write_text(self._record_path(entry), json.dumps(record, indent=1) + "\n")
        return made

    def _record_path(self, entry: ShardEntry) -> Path:
        return self._out / WORK_FOLDER / f"{entry.file}.json"

    def _sha256(self, entry: ShardEntry) -> str:
        """Identifies the output: hash of the contents and of the compression settings."""
        compression = self._compression
        parts = [
            entry.split,
            entry.content_sha256,
            compression.level,
            compression.long_distance,
            compression.dictionary_sha256,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _stored_dictionary(data_set: DataSet, out: Path, dictionary_bytes: int) -> bytes:
    """The dictionary that an earlier run has stored, or else a new one, which is stored."""
    path = out / DICTIONARY_NAME
    if path.exists():
        return _require_usable(read_file(path, MAX_DICTIONARY_BYTES), path)
    frames = []
    manifest = data_set.manifest
    max_frames = _SAMPLE_BYTES // (manifest.frame_tokens * manifest.id_bytes)
    for entry, numbers in spread_frames(manifest, "train", min(_SAMPLE_FRAMES, max_frames)):
        with data_set.open_shard(entry) as reader:
            frames += [reader.frame(number).tobytes() for number in numbers]
    dictionary = train_dictionary(frames, dictionary_bytes)
    with replacing(path) as file:
        file.write(dictionary)
    return dictionary


def _require_usable(dictionary: bytes, path: Path) -> bytes:
    """The dictionary, if zstd accepts it. Raises OutputExistsError."""
    try:
        Compression(dictionary=dictionary).compressor().compress(b"ids")
    except zstandard.ZstdError:
        raise OutputExistsError(
            f"{path} is not a zstd dictionary, so an earlier run did not write it; remove the "
            "file, or choose another `out`"
        ) from None
    return dictionary


def _claim_folder(out: Path, shards: Path, settings: RecompressSettings) -> None:
    """Create the output folder, or check that it is one of the same settings."""
    require_apart(out, (shards,))
    require_no_link(out / WORK_FOLDER)
    settings_path = out / WORK_FOLDER / _SETTINGS_NAME
    if settings_path.exists():
        try:
            earlier = read_json(settings_path)
        except ValueError:
            earlier = None
        earlier = earlier if isinstance(earlier, dict) else {}
        differing = differing_keys(earlier, asdict(settings))
        if differing:
            raise OutputExistsError(
                f"{out} was started with other settings ({shown_values(differing, 0)}, not "
                f"{shown_values(differing, 1)}); choose another `out`, or remove that folder"
            )
        return
    # An empty work folder is ours: an earlier run was killed before it wrote its settings.
    if out.exists() and (
        not out.is_dir()
        or any(path.name != WORK_FOLDER for path in out.iterdir())
        or any(path.suffix != ".partial" for path in (out / WORK_FOLDER).glob("*"))
    ):
        raise OutputExistsError(f"{out} already holds other files; choose another `out`")
    settings_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(settings_path, json.dumps(asdict(settings), indent=2) + "\n")


def _shards_in(out: Path) -> list[Path]:
    """The files with names of shards."""
    return [path for path in out.glob("*.zst") if SHARD_NAME.fullmatch(path.name)]


def _remove_strays(out: Path, manifest: Manifest) -> None:
    """Remove partial files of killed processes."""
    names = {entry.file for entry in manifest.shards}
    strays = [path for path in _shards_in(out) if path.name not in names]
    records = unfinished_in(out / WORK_FOLDER, _RECORD_NAME)
    for path in [*strays, *unfinished_in(out, FILE_NAME), *records]:
        path.unlink(missing_ok=True)


def _forget_if_nothing_is_done(out: Path, was_there: bool) -> None:
    """After a failure, remove our files unless a shard is done."""
    work = out / WORK_FOLDER
    if (out / MANIFEST_NAME).exists() or any(
        path.name != _SETTINGS_NAME for path in work.glob("*.json")
    ):
        return
    shutil.rmtree(work, ignore_errors=True)
    for path in [*_shards_in(out), *unfinished_in(out, FILE_NAME), out / DICTIONARY_NAME]:
        path.unlink(missing_ok=True)
    if not was_there and out.is_dir() and not any(out.iterdir()):
        out.rmdir()


@click.command(
    cls=ResumableCommand,
    name="recompress",
    epilog=examples(
        "megaback shards recompress data/fineweb-100bt --out data/fineweb-small",
        "megaback shards recompress data/prose --out data/prose-small "
        "--compression-level 19 --dictionary-bytes 131072",
    ),
)
@click.argument("shards", type=click.Path(path_type=Path))
@out_folder_option
@click.option(
    "--compression-level",
    type=LEVEL.option,
    default=_DEFAULT_LEVEL,
    show_default=True,
    help="Compression level of zstd: higher is smaller and slower to write, hardly slower to read.",
)
@click.option(
    "--long-distance",
    is_flag=True,
    help="Enable zstd's long-distance matching; no gain with frames of the default size.",
)
@click.option(
    "--dictionary-bytes",
    type=DICTIONARY_BYTES.option,
    help="Size of a dictionary to train, in bytes. Default: no dictionary.",
)
@workers_option("threads")
def main(
    shards: Path,
    out: Path,
    compression_level: int,
    long_distance: bool,
    dictionary_bytes: int | None,
    workers: int | None,
) -> None:
    """Rewrite the data set SHARDS with other compression; its contents stay the same."""
    before = Manifest.load(shards)
    compression = Compression(level=compression_level, long_distance=long_distance)
    after, num_found = recompress(shards, out, compression, dictionary_bytes, workers)
    if num_found:
        click.echo(f"{num_found} shards were already done")
    for split in SPLITS:
        total = after.total(split)
        if total["tokens"]:
            was_bytes, raw_bytes = (
                before.total(split)["file_bytes"],
                total["tokens"] * after.id_bytes,
            )
            click.echo(
                f"{split:<12} {total['shards']} shards, {total['tokens']:,} tokens; files at "
                f"{total['file_bytes'] / raw_bytes:.3f} of the raw ids, before at "
                f"{was_bytes / raw_bytes:.3f}"
            )
    click.echo(f"fingerprint  {after.fingerprint}")


if __name__ == "__main__":
    main()
