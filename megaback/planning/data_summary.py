"""Facts of a data set that a new config depends on, or assumptions in place of them.

Loads no torch and decodes no shard.
"""

from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from data_pipeline.redaction import is_url
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.document_lengths import read_document_lengths
from data_pipeline.text.codec import Direction, Unit
from megaback.planning.data_facts import DEFAULT_VOCAB_SIZE, attended_of

PLACEHOLDER = "data/shards"
_LONG_DOCUMENTS = 0.95
_MIN_CONTEXT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """A data set, or a placeholder."""

    shards: str
    vocab_size: int
    data_set: DataSet | None = None
    """None: there is no data yet."""
    train_tokens: int | None = None
    val_tokens: int = 0
    long_tokens: int | None = None
    """Length in tokens that 95% of the documents do not exceed; None: not known."""

    @classmethod
    def of(cls, shards: str) -> "DataSummary":
        """Read a data set.

        Raises ConfigError for instruction examples, and the errors of `DataSet.open`.
        """
        data_set = DataSet.open(shards)
        manifest = data_set.manifest
        if manifest.row_tokens is not None:
            raise ConfigError(
                f"{data_set.name} has instruction examples, which models are fine-tuned on: use "
                "configs/backchat.yaml with init_from, or give `shards` of documents"
            )
        form = manifest.text_format
        if form.direction is not Direction.BACKWARD and form.unit is not Unit.TOKEN:
            raise ConfigError(
                f"{data_set.name} is reversed by {form.unit.value} and stored "
                f"{form.direction.value}, so no backward model can read it; build shards of "
                "direction backward"
            )
        long_tokens = None
        if not is_url(data_set.name):
            long_tokens = read_document_lengths(data_set, "train").quantile(_LONG_DOCUMENTS)
        return cls(
            shards=shards,
            vocab_size=manifest.vocab_size,
            data_set=data_set,
            train_tokens=manifest.total("train")["tokens"],
            val_tokens=manifest.total("val")["tokens"],
            long_tokens=long_tokens,
        )

    @classmethod
    def assumed(cls, vocab_size: int | None) -> "DataSummary":
        return cls(shards=PLACEHOLDER, vocab_size=vocab_size or DEFAULT_VOCAB_SIZE)

    def fitting_context(self, context_tokens: int) -> int:
        """A row length of at most `context_tokens`, no longer than documents need.

        It divides the frames.
        """
        while self.long_tokens is not None and context_tokens >= max(
            2 * self.long_tokens, 2 * _MIN_CONTEXT_TOKENS
        ):
            context_tokens //= 2
        if self.data_set is None:
            return context_tokens
        frame = self.data_set.manifest.frame_tokens
        return max(n for n in range(2, min(context_tokens, frame) + 1) if not frame % n)

    def attended_tokens(self, context_tokens: int) -> float:
        """Mean number of tokens that a token attends to; without data, one document per row."""
        if self.data_set is None:
            return (context_tokens + 1) / 2
        return attended_of(self.data_set, context_tokens)
