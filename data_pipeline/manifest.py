"""The manifest of a folder of shards: written last, read first.

A folder without `manifest.json` is not a data set, whatever else it holds. The manifest says
which shards there are, what is in them, and the fingerprint of their contents, which the order of
training depends on: the same documents, tokenizer, direction, unit and cut into shards give the
same fingerprint, however they were compressed.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.command import write_text
from data_pipeline.errors import ShardCorruptError, ShardsMissingError, TokenizerMismatchError
from data_pipeline.number_ranges import finite_json
from data_pipeline.shard_format import ShardReader
from data_pipeline.skipped import Skipped, skipped_from_json, skipped_to_json
from data_pipeline.text import TextCodec, TextFormat

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
DICTIONARY_NAME = "dictionary.zdict"
FORMAT_NAME = "megaback-shards"
FORMAT_VERSION = 1
"""Of documents."""
EXAMPLES_VERSION = 2
"""Of examples in rows."""
SPLITS = ("train", "val")
SHARD_NAME = re.compile(r"(train|val)-\d{5,}-\d{5,}\.zst")
"""The names of shards: what else a folder holds is not ours to remove."""
_OF_EXAMPLES = ("learnt_tokens", "padding_tokens")


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a split."""

    file: str
    split: str
    tokens: int
    documents: int
    text_bytes: int
    file_bytes: int
    file_sha256: str
    content_sha256: str
    learnt_tokens: int = 0
    """Of examples: those with loss."""
    padding_tokens: int = 0
    """Of examples: those that fill rows."""


@dataclass(frozen=True)
class Manifest:
    """A data set: what is common to its shards, and the shards in order."""

    text_format: TextFormat
    vocab_size: int
    begin_id: int
    end_id: int
    id_bytes: int
    frame_tokens: int
    source: str
    val_fraction: float
    left_out: dict[str, int]
    """How many documents each filter left out, by its name."""
    shards: tuple[ShardEntry, ...]
    dictionary_sha256: str | None = None
    """Of the zstd dictionary that every shard needs, in the file `dictionary.zdict`."""
    row_tokens: int | None = None
    """Of instruction examples: the row that none of them crosses. None: documents."""
    skipped: Skipped = field(default_factory=dict)
    """Files, malformed records and parts of records that were not read, by cause."""
    asked_val_fraction: float | None = None
    """The val fraction that was asked for, where it was raised to give the val set its minimum."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the contents: what every shard holds, in order."""
        contents: dict[str, Any] = {
            **self.text_format.to_dict(),
            "frame_tokens": self.frame_tokens,
            "shards": [[shard.split, shard.content_sha256] for shard in self.shards],
        }
        if self.row_tokens is not None:
            contents["row_tokens"] = self.row_tokens
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def split(self, name: str) -> tuple[ShardEntry, ...]:
        return tuple(shard for shard in self.shards if shard.split == name)

    def total(self, name: str) -> dict[str, int]:
        """Sums over a split: shards, documents, tokens, text_bytes, file_bytes.

        Of examples, learnt_tokens and padding_tokens too.
        """
        shards = self.split(name)
        summed = ["documents", "tokens", "text_bytes", "file_bytes"]
        if self.row_tokens is not None:
            summed += _OF_EXAMPLES
        return {"shards": len(shards)} | {
            field: sum(getattr(shard, field) for shard in shards) for field in summed
        }

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically; from then on the folder is a data set."""
        is_of_examples = self.row_tokens is not None
        fields: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": EXAMPLES_VERSION if is_of_examples else FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            **self.text_format.to_dict(),
            "vocab_size": self.vocab_size,
            "begin_id": self.begin_id,
            "end_id": self.end_id,
            "id_bytes": self.id_bytes,
            "frame_tokens": self.frame_tokens,
            "source": self.source,
            "val_fraction": self.val_fraction,
            "left_out": self.left_out,
            "dictionary_sha256": self.dictionary_sha256,
            "splits": {name: self.total(name) for name in SPLITS},
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.asked_val_fraction is not None:
            fields["asked_val_fraction"] = self.asked_val_fraction
        if self.skipped:
            fields["skipped"] = skipped_to_json(self.skipped)
        if is_of_examples:
            fields["row_tokens"] = self.row_tokens
        else:
            for entry in fields["shards"]:
                for name in _OF_EXAMPLES:
                    del entry[name]
        write_text(folder / MANIFEST_NAME, json.dumps(fields, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check a manifest.

        Raises ShardsMissingError when the folder has none, ShardCorruptError when it does not say
        what a manifest must say or when its fingerprint is not that of its entries.
        """
        path = folder / MANIFEST_NAME
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise shards_missing(str(folder)) from None
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: bytes, shown: str) -> "Manifest":
        """Check a manifest's bytes; `shown` names them. Raises ShardCorruptError."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ShardCorruptError(f"{shown} is not text; build the shards again") from None
        try:
            fields = finite_json(text)
            is_of_examples = fields["version"] == EXAMPLES_VERSION
            if fields["format"] != FORMAT_NAME or not (
                is_of_examples or fields["version"] == FORMAT_VERSION
            ):
                raise ValueError(f"format {fields['format']} version {fields['version']}")
            row_tokens = fields["row_tokens"] if is_of_examples else None
            if is_of_examples and (not isinstance(row_tokens, int) or row_tokens < 1):
                raise ValueError(f"row_tokens is {row_tokens!r}")
            manifest = cls(
                text_format=TextFormat.from_dict(fields),
                vocab_size=fields["vocab_size"],
                begin_id=fields["begin_id"],
                end_id=fields["end_id"],
                id_bytes=fields["id_bytes"],
                frame_tokens=fields["frame_tokens"],
                source=fields["source"],
                val_fraction=fields["val_fraction"],
                left_out=dict(fields["left_out"]),
                shards=tuple(ShardEntry(**entry) for entry in fields["shards"]),
                dictionary_sha256=fields.get("dictionary_sha256"),
                row_tokens=row_tokens,
                skipped=skipped_from_json(fields.get("skipped", {})),
                asked_val_fraction=fields.get("asked_val_fraction"),
            )
            if manifest.fingerprint != fields["fingerprint"]:
                raise ValueError("its fingerprint is not that of its entries")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ShardCorruptError(
                f"{shown} is not a manifest of this version ({error}); build the shards again"
            ) from None
        return manifest

    def open_shard(self, folder: Path, entry: ShardEntry) -> ShardReader:
        """Open one of the shards in `folder`. Raises ShardCorruptError."""
        dictionary = None
        if self.dictionary_sha256 is not None:
            dictionary = _read_dictionary_once(folder / DICTIONARY_NAME, self.dictionary_sha256)
        return ShardReader(folder / entry.file, dictionary)

    def require_dictionary(self, folder: Path) -> None:
        """Raises ShardCorruptError unless the dictionary that the shards need, if any, is there."""
        if self.dictionary_sha256 is not None:
            _read_dictionary(folder / DICTIONARY_NAME, self.dictionary_sha256)

    def codec(self, folder: Path) -> TextCodec:
        """The codec that these shards were encoded with, from the copy of the tokenizer there."""
        text_format = self.text_format
        codec = TextCodec.load(folder / TOKENIZER_NAME, text_format.direction, text_format.unit)
        self.require_codec(codec, str(folder))
        return codec

    def require_codec(self, codec: TextCodec, shown: str) -> None:
        """Raises TokenizerMismatchError or ShardCorruptError unless a codec made these shards.

        `shown` names their folder.
        """
        if codec.format.tokenizer_sha256 != self.text_format.tokenizer_sha256:
            raise TokenizerMismatchError(
                f"{shown}/{TOKENIZER_NAME} has sha256 {codec.format.tokenizer_sha256[:12]}, "
                "but the shards beside it "
                f"were made with {self.text_format.tokenizer_sha256[:12]}; restore that tokenizer"
            )
        of_codec = (codec.vocab_size, codec.begin_id, codec.end_id, codec.id_dtype.itemsize)
        said = (self.vocab_size, self.begin_id, self.end_id, self.id_bytes)
        if said != of_codec:
            raise ShardCorruptError(
                f"{shown}/{MANIFEST_NAME} gives pieces, begin, end and bytes of an id as {said}, "
                f"its tokenizer as {of_codec}; restore it or build the shards again"
            )


def shards_missing(shown: str) -> ShardsMissingError:
    """What is wrong with a folder without a manifest."""
    return ShardsMissingError(
        f"{shown} is not a finished set of shards (it has no {MANIFEST_NAME}); "
        "run `megaback shards build --out` with this folder, to the end"
    )


def unreadable_dictionary(shown: str, error: OSError) -> ShardCorruptError:
    """What is wrong when a dictionary cannot be read."""
    return ShardCorruptError(
        f"cannot read {shown}, without which the shards beside it cannot be read: "
        f"{error.strerror}; restore that file or build the shards again"
    )


def require_dictionary_sha256(dictionary: bytes, expected_sha256: str, shown: str) -> None:
    """Raises ShardCorruptError unless it is the dictionary that the shards beside it need."""
    sha256 = hashlib.sha256(dictionary).hexdigest()
    if sha256 != expected_sha256:
        raise ShardCorruptError(
            f"{shown} has sha256 {sha256[:12]}, but the shards beside it were compressed with "
            f"{expected_sha256[:12]}; restore that file or build the shards again"
        )


def _read_dictionary(path: Path, expected_sha256: str) -> bytes:
    try:
        dictionary = path.read_bytes()
    except OSError as error:
        raise unreadable_dictionary(str(path), error) from None
    require_dictionary_sha256(dictionary, expected_sha256, str(path))
    return dictionary


# A data set has thousands of shards, which share one dictionary.
_read_dictionary_once = lru_cache(maxsize=2)(_read_dictionary)
