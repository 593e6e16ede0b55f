"""Build settings: everything that decides the bytes of a data set, and the document filters.

Equal settings, texts and tokenizer give equal shards. Number of workers and location of files are
not settings.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import briefly, made_from, require_within
from data_pipeline.common.differences import differing_keys, shown_values
from data_pipeline.common.number_ranges import (
    INT64_MAX,
    LEVEL,
    NUMBER,
    RECORD_BYTES,
    SHARE_BELOW_ALL,
    SOURCE_WEIGHT,
)
from data_pipeline.errors import (
    ConfigError,
    DirectionMismatchError,
    OutputExistsError,
    TokenizerMismatchError,
)
from data_pipeline.redaction import is_url, place_of, shown_url
from data_pipeline.shards.compression import DEFAULT_LEVEL
from data_pipeline.shards.writer import DEFAULT_FRAME_TOKENS
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.documents import AnyColumns, Columns, Document
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES
from data_pipeline.sources.tokenized.documents import TokenizedFormat
from data_pipeline.sources.weighted import BAD_RECORD_CHOICES, WeightedSource
from data_pipeline.text.codec import Direction, Unit

CHANGEABLE = ("on_bad_record", "max_record_bytes")
"""Settings that decide what fails, not what is written: a resumed build may change them."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings that decide the bytes of the shards, with the sources' texts and the tokenizer."""

    sources: tuple[WeightedSource, ...]
    tokenizer_sha256: str
    direction: str = Direction.BACKWARD.value
    unit: str = Unit.TOKEN.value
    val_fraction: float = 0.01
    frame_tokens: int = DEFAULT_FRAME_TOKENS
    shard_tokens: int = 1 << 26
    compression_level: int = DEFAULT_LEVEL
    text_column: str = "text"
    language_column: str = "language"
    language_score_column: str = "language_score"
    languages: tuple[str, ...] = ()
    """Languages of the documents to keep; empty: all."""
    min_language_score: float | None = None
    min_characters: int = 1
    max_characters: int | None = None
    on_bad_record: str = "stop"
    deduplicate: bool = False
    """Keep only the first of equal texts."""
    limit_documents: int | None = None
    """Maximum number of documents after filters and de-duplication; the first ones are kept."""
    limit_tokens: int | None = None
    """Maximum total number of tokens, markers included; the first documents are kept."""
    examples: ExampleColumns | None = None
    """Columns of instruction examples; None: documents of text are read."""
    row_tokens: int | None = None
    """Length in tokens of the rows that examples are packed into; longer ones are excluded."""
    html: bool = False
    """Whether the text of HTML pages is read."""
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    """Longer records are malformed."""
    tokenized: TokenizedFormat | None = None
    """Format of files with ids in place of text; None: text is read and encoded."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range, naming its option."""
        frame_tokens = self.frame_tokens
        if frame_tokens < 64 or frame_tokens & (frame_tokens - 1) or frame_tokens > 1 << 24:
            raise ConfigError(
                f"`frame_tokens` is {frame_tokens}; it must be a power of two from 64 to 16777216"
            )
        row_tokens = self.row_tokens
        if row_tokens is not None and (row_tokens < 8 or frame_tokens % row_tokens):
            raise ConfigError(
                f"`context_tokens` is {row_tokens}, which does not divide `frame_tokens` "
                f"{frame_tokens}; choose a power of two from 8 to {frame_tokens}"
            )
        if (problem := RECORD_BYTES.problem(self.max_record_bytes)) is not None:
            raise ConfigError(f"`max_record_bytes` is {self.max_record_bytes}, {problem}")
        if SHARE_BELOW_ALL.problem(self.val_fraction):
            raise ConfigError(
                f"`val_fraction` is {self.val_fraction}; it must be at least 0 and below 1"
            )
        minimum = self.min_language_score
        if minimum is not None and (problem := NUMBER.problem(minimum)) is not None:
            raise ConfigError(f"`min_language_score` is {minimum}, {problem}; no score could pass")
        for part in self.sources:
            if SOURCE_WEIGHT.problem(part.weight):
                raise ConfigError(
                    f"`weight` is {part.weight} for {shown_url(part.source)}; "
                    "it must be above 0 and at most 1000"
                )
        if self.tokenized is not None and self.unit != Unit.TOKEN.value:
            raise ConfigError(
                f"`unit` is {self.unit!r}, which reverses text before it is encoded, and tokenized "
                "sources hold ids; use token"
            )
        if self.max_characters is not None and self.max_characters < self.min_characters:
            raise ConfigError(
                f"`max_characters` is {self.max_characters}, less than "
                f"`min_characters` {self.min_characters}; no document could pass"
            )

    @property
    def description(self) -> str:
        """The sources in one line, for messages."""
        return ", ".join(str(part) for part in self.sources)

    @property
    def columns(self) -> AnyColumns:
        """The columns to read: those of the examples, or of the text and its filters."""
        if self.examples is not None:
            return self.examples
        return Columns(
            self.text_column,
            self.language_column if self.languages else None,
            self.language_score_column if self.min_language_score is not None else None,
            self.html,
        )

    @property
    def is_limited(self) -> bool:
        return self.limit_documents is not None or self.limit_tokens is not None

    @property
    def selects(self) -> bool:
        """Whether the documents that a task keeps depend on other tasks."""
        return self.deduplicate or self.is_limited

    def exclusion_reason(self, document: Document) -> str | None:
        """The filter that excludes a document: `empty`, `length`, `language`, `language_score`."""
        if document.tokenized is not None:
            return None if document.tokenized.utf8 else "empty"
        if not document.text or document.response == "":
            return "empty"
        characters = len(document.text)
        if characters < self.min_characters or characters > (self.max_characters or characters):
            return "length"
        if self.languages and document.language not in self.languages:
            return "language"
        score = document.language_score
        if self.min_language_score is not None and (
            score is None or not score >= self.min_language_score
        ):
            return "language_score"
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BuildSettings":
        """Raises ConfigError, TypeError or ValueError unless they are settings of this version."""
        settings = made_from(cls, values)
        Direction(settings.direction)
        Unit(settings.unit)
        require_within("shard_tokens", settings.shard_tokens, 1, INT64_MAX)
        require_within("compression_level", settings.compression_level, 1, int(LEVEL.max))
        if settings.on_bad_record not in BAD_RECORD_CHOICES:
            raise ValueError(f"on_bad_record is {briefly(settings.on_bad_record)}")
        for part in settings.sources:
            if part.split not in (None, "train", "val"):
                raise ValueError(f"a source's split is {briefly(part.split)}")
        return settings

    def require_same(self, wanted: "BuildSettings", out: Path) -> None:
        """Check that a folder's build is resumed with the settings that it was begun with.

        Raises TokenizerMismatchError, DirectionMismatchError or OutputExistsError.
        """
        # Incompatible settings are reported before those that merely differ.
        first = ("tokenizer_sha256", "direction", "unit")
        for name in (*first, *(field.name for field in fields(self))):
            mine, theirs = getattr(self, name), getattr(wanted, name)
            if mine == theirs or name in CHANGEABLE:
                continue
            if name == "sources" and _same_places(mine, theirs):
                continue
            if name == "tokenizer_sha256":
                raise TokenizerMismatchError(
                    f"{out} holds shards of tokenizer {mine[:12]}, not of the given tokenizer "
                    f"{theirs[:12]}; choose another `out` or that tokenizer"
                )
            if name in ("direction", "unit"):
                raise DirectionMismatchError(
                    f"{out} holds shards with {name} {mine!r}, not {theirs!r}; choose another `out`"
                )
            if name == "sources":
                raise OutputExistsError(
                    f"{out} holds shards of {self.description}, not of {wanted.description}; "
                    "choose another `out`, or remove that folder"
                )
            differing = differing_keys(self.to_dict(), wanted.to_dict(), [name])
            raise OutputExistsError(
                f"{out} holds shards with other settings ({shown_values(differing, 0)}, not "
                f"{shown_values(differing, 1)}); choose another `out`, or remove that folder"
            )


def content_settings(settings: BuildSettings) -> dict[str, Any]:
    """The settings that decide what a task writes; the spelling of a source does not."""
    decisive = replace(settings, sources=()).to_dict()
    del decisive["on_bad_record"]  # decides what fails, not what is written
    if settings.tokenized is None:  # keeps the hashes of old plans
        del decisive["tokenized"]
    # The same, unless longer records are skipped. The default keeps the hashes of old plans.
    is_default = settings.max_record_bytes == DEFAULT_MAX_RECORD_BYTES
    if is_default or settings.on_bad_record == "stop":
        del decisive["max_record_bytes"]
    return decisive


def _place(source: str) -> str | Path:
    return place_of(source) if is_url(source) else Path(source).resolve()


def _same_places(left: tuple[WeightedSource, ...], right: tuple[WeightedSource, ...]) -> bool:
    """Whether two builds read the same, one perhaps by a relative path or another signature."""
    return len(left) == len(right) and all(
        (a.weight, a.split) == (b.weight, b.split) and _place(a.source) == _place(b.source)
        for a, b in zip(left, right, strict=True)
    )
