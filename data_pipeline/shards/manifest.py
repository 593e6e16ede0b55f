"""The manifest of a folder of shards: written last, read first.

A folder without `manifest.json` is not a data set. The manifest lists the shards with their sizes
and hashes, and the fingerprint of their contents, on which the order of training depends: the same
documents, tokenizer, direction, unit and cut into shards give the same fingerprint, with any
compression.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import (
    briefly,
    checked,
    made_from,
    parse_json,
    require_sha256,
    require_within,
)
from data_pipeline.common.file_names import path_within, plain_name
from data_pipeline.common.limits import (
    ID_BYTES,
    MAX_COUNTS,
    MAX_FRAME_TOKENS,
    MAX_FRAMES,
    MAX_MANIFEST_BYTES,
    MAX_SHARD_TOKENS,
    MAX_SOURCE_CHARACTERS,
    MAX_VOCABULARY,
)
from data_pipeline.common.local_paths import with_absolute
from data_pipeline.common.number_ranges import INT64_MAX, SHARE_BELOW_ALL
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import (
    ConfigError,
    ShardCorruptError,
    ShardsMissingError,
)
from data_pipeline.redaction import scrub
from data_pipeline.sources.skipped import Skipped, skipped_from_json, skipped_to_json
from data_pipeline.text.codec import TextFormat
from data_pipeline.text.tokenizer import ANY_TOKENIZER

MANIFEST_NAME = "manifest.json"
DICTIONARY_NAME = "dictionary.zdict"
FORMAT_NAME = "megaback-shards"
FORMAT_VERSION = 3
"""Version of manifests of documents."""
EXAMPLES_VERSION = 4
"""Version of manifests of examples in rows."""
_EARLIER_VERSIONS = (1, 2)
SPLITS = ("train", "val")
SHARD_NAME = re.compile(r"(train|val)-[0-9]{5,}-[0-9]{5,}\.zst")
"""Names of shards: no other `.zst` file of a folder is removed."""
FILE_NAME = re.compile(
    rf"{SHARD_NAME.pattern}|{re.escape(MANIFEST_NAME)}|{ANY_TOKENIZER}"
    rf"|{re.escape(DICTIONARY_NAME)}|plan\.json"
)
"""Names of the files that a build writes into its folder."""
_OF_EXAMPLES = ("loss_tokens", "padding_tokens")


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
    loss_tokens: int = 0
    """Tokens of examples with loss."""
    padding_tokens: int = 0
    """Tokens that fill rows of examples."""

    @classmethod
    def from_json(cls, fields: object) -> "ShardEntry":
        """Raises ValueError or TypeError for a name or number that no shard can have."""
        entry = made_from(cls, fields)
        plain_name(entry.file, SHARD_NAME)
        if entry.split not in SPLITS or not entry.file.startswith(f"{entry.split}-"):
            raise ValueError(f"{entry.file} is not a shard of the split {briefly(entry.split)}")
        require_sha256("file_sha256", entry.file_sha256)
        require_sha256("content_sha256", entry.content_sha256)
        require_within("tokens", entry.tokens, 1, MAX_SHARD_TOKENS)
        require_within("documents", entry.documents, 1, min(entry.tokens, MAX_COUNTS))
        require_within("text_bytes", entry.text_bytes, 0, INT64_MAX)
        require_within("file_bytes", entry.file_bytes, 1, INT64_MAX)
        require_within("loss_tokens", entry.loss_tokens, 0, entry.tokens)
        left = entry.tokens - entry.loss_tokens
        require_within("padding_tokens", entry.padding_tokens, 0, left)
        return entry


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a data set: format, settings, and the shards in order."""

    text_format: TextFormat
    vocab_size: int
    begin_id: int
    end_id: int
    id_bytes: int
    frame_tokens: int
    source: str
    val_fraction: float
    excluded: dict[str, int]
    """Number of documents that each filter excluded, by its name."""
    shards: tuple[ShardEntry, ...]
    dictionary_sha256: str | None = None
    """SHA-256 of the zstd dictionary that every shard needs, in the file `dictionary.zdict`."""
    row_tokens: int | None = None
    """Length in tokens of the rows that no instruction example crosses; None for documents."""
    skipped: Skipped = field(default_factory=dict)
    """Files, malformed records and parts of records that were skipped, by cause."""
    requested_val_fraction: float | None = None
    """The requested val fraction, if it was raised to give the val set its minimum."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the contents of all shards, in order."""
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

        For examples, also loss_tokens and padding_tokens.
        """
        shards = self.split(name)
        summed = ["documents", "tokens", "text_bytes", "file_bytes"]
        if self.row_tokens is not None:
            summed += _OF_EXAMPLES
        return {"shards": len(shards)} | {
            field: sum(getattr(shard, field) for shard in shards) for field in summed
        }

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically; from then on the folder is a data set.

        Raises ConfigError when there are too many shards, and ShardCorruptError when the records
        that it was made from are inconsistent.
        """
        try:
            self._require_consistent()
        except ValueError as error:
            raise ShardCorruptError(
                f"the records of the shards in {folder} are damaged ({error!s:.300}); remove that "
                "folder, and build the shards again"
            ) from None
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
            "excluded": self.excluded,
            "dictionary_sha256": self.dictionary_sha256,
            "splits": {name: self.total(name) for name in SPLITS},
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.requested_val_fraction is not None:
            fields["requested_val_fraction"] = self.requested_val_fraction
        if self.skipped:
            fields["skipped"] = skipped_to_json(self.skipped)
        if is_of_examples:
            fields["row_tokens"] = self.row_tokens
        else:
            for entry in fields["shards"]:
                for name in _OF_EXAMPLES:
                    del entry[name]
        text = json.dumps(fields, indent=2) + "\n"
        if len(text) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"the manifest of {len(self.shards):,} shards in {folder} would be too large to "
                "read; build them again with a larger `shard_tokens`, or fewer `tasks`"
            )
        write_text(folder / MANIFEST_NAME, text)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check a manifest.

        Raises ShardsMissingError when the folder has none, ShardCorruptError when it is malformed
        or its fingerprint is not that of its entries.
        """
        return cls.read(str(folder), partial(read_file, folder / MANIFEST_NAME))

    @classmethod
    def read(cls, shown: str, read: Callable[[int], bytes]) -> "Manifest":
        """As `load`, for the folder `shown`; `read(max_bytes)` returns its manifest's bytes."""
        path = f"{shown}/{MANIFEST_NAME}"
        try:
            data = read(MAX_MANIFEST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise shards_missing(shown) from None
        except OSError as error:
            if error.errno not in UNFIT:
                raise
            raise ShardCorruptError(
                f"cannot read {path}: {error.strerror}; restore it or build the shards again"
            ) from None
        return cls.from_json(data, path)

    @classmethod
    def from_json(cls, data: bytes, shown: str) -> "Manifest":
        """Check a manifest's bytes; `shown` names them. Raises ShardCorruptError."""
        try:
            fields = parse_json(data)
            manifest = cls._of_fields(fields)
            manifest._require_consistent()
            if manifest.fingerprint != fields["fingerprint"]:
                raise ValueError("its fingerprint is not that of its entries")
        except UnicodeDecodeError:
            raise ShardCorruptError(f"{shown} is not text; build the shards again") from None
        except KeyError as error:
            raise _not_a_manifest(shown, f"it lacks {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise _not_a_manifest(shown, error) from None
        return manifest

    @classmethod
    def _of_fields(cls, fields: Any) -> "Manifest":
        """Raises KeyError, TypeError, ValueError or AttributeError."""
        version = fields["version"]
        is_of_examples = version == EXAMPLES_VERSION
        if fields["format"] != FORMAT_NAME or not (is_of_examples or version == FORMAT_VERSION):
            if fields["format"] == FORMAT_NAME and version in _EARLIER_VERSIONS:
                raise ValueError("an earlier version of megaback wrote it, with other names")
            raise ValueError(f"format {briefly(fields['format'])} version {briefly(version)}")
        row_tokens = checked("row_tokens", fields["row_tokens"], int) if is_of_examples else None
        # Earlier versions wrote addresses with their secrets.
        source = checked("source", fields["source"], str)
        require_within("characters of its source", len(source), 0, MAX_SOURCE_CHARACTERS)
        fields = {**fields, "source": scrub(source)}
        return cls(
            text_format=TextFormat.from_dict(fields),
            **{name: checked(name, fields[name], kind) for name, kind in _REQUIRED.items()},
            **{name: checked(name, fields.get(name), kind) for name, kind in _OPTIONAL.items()},
            shards=tuple(map(ShardEntry.from_json, checked("shards", fields["shards"], list))),
            row_tokens=row_tokens,
            skipped=skipped_from_json(fields.get("skipped", {})),
        )

    def _require_consistent(self) -> None:
        """Raises ValueError for a number that is out of range or contradicts another one."""
        require_sha256("tokenizer_sha256", self.text_format.tokenizer_sha256)
        if self.text_format.both:
            raise ValueError("its direction is 'both', which only models have")
        if self.dictionary_sha256 is not None:
            require_sha256("dictionary_sha256", self.dictionary_sha256)
        if self.id_bytes not in ID_BYTES:
            raise ValueError(f"id_bytes is {self.id_bytes}")
        max_pieces = min(MAX_VOCABULARY, 1 << 8 * self.id_bytes)
        require_within("vocab_size", self.vocab_size, 1, max_pieces)
        require_within("begin_id", self.begin_id, 0, self.vocab_size - 1)
        require_within("end_id", self.end_id, 0, self.vocab_size - 1)
        require_within("frame_tokens", self.frame_tokens, 1, MAX_FRAME_TOKENS)
        if self.row_tokens is not None:
            require_within("row_tokens", self.row_tokens, 1, self.frame_tokens)
            if self.frame_tokens % self.row_tokens:
                raise ValueError(f"row_tokens {self.row_tokens} does not divide frame_tokens")
        for fraction in (self.val_fraction, self.requested_val_fraction or 0.0):
            if (problem := SHARE_BELOW_ALL.problem(fraction)) is not None:
                raise ValueError(f"a val fraction is {fraction}, {problem}")
        for name, number in self.excluded.items():
            require_within(f"excluded.{briefly(name)}", number, 0, INT64_MAX)
        names = Counter(entry.file for entry in self.shards)
        for name, number in names.most_common(1):
            if number > 1:
                raise ValueError(f"it lists {name} {number} times")
        for entry in self.shards:
            frames = -(-entry.tokens // self.frame_tokens)
            require_within(f"frames of {entry.file}", frames, 1, MAX_FRAMES)


def shard_path(folder: Path, entry: ShardEntry) -> Path:
    """Path of a shard. Raises ShardCorruptError for a link out of the folder."""
    try:
        return path_within(folder, entry.file, SHARD_NAME)
    except ValueError as error:
        raise ShardCorruptError(f"{folder}: {error}, or build the shards again") from None


def shards_missing(shown: str) -> ShardsMissingError:
    """The error for a folder without a manifest."""
    return ShardsMissingError(
        f"there is no data set at {with_absolute(shown)}, or its build is unfinished (no "
        f"{MANIFEST_NAME}); check the path, or build it with `megaback shards build`"
    )


def _not_a_manifest(shown: str, why: object) -> ShardCorruptError:
    return ShardCorruptError(
        f"{shown} is not a manifest of this version ({why!s:.300}); build the shards again"
    )


_REQUIRED = {
    **dict.fromkeys(("vocab_size", "begin_id", "end_id", "id_bytes", "frame_tokens"), int),
    "source": str,
    "val_fraction": float,
    "excluded": dict[str, int],
}
_OPTIONAL = {"dictionary_sha256": str | None, "requested_val_fraction": float | None}
"""Types of the fields of a manifest."""
