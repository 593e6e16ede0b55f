"""Val rows on which a trained model is measured: its context and direction are fixed.

The errors advise other shards, where those of a run that starts advise another config.
"""

from data_pipeline.errors import ConfigError, DirectionMismatchError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.rows import RowReader
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest
from data_pipeline.text.codec import TextFormat, Unit


def measured_rows(
    data_set: DataSet, model: str, text_format: TextFormat, context_tokens: int
) -> RowReader:
    """Rows of a data set's val set, as a model reads them; `model` is its name in errors.

    Raises ConfigError, DirectionMismatchError and TokenizerMismatchError for shards that the model
    cannot read, and the errors of shards.
    """
    require_measurable(data_set.manifest, data_set.name, model, text_format, context_tokens)
    frames = FrameStore(data_set, "val")
    rows = RowReader(frames, context_tokens, text_format.direction, both=text_format.both)
    rows.text_format.require_same(text_format, f"the data set {data_set.name}", model)
    return rows


def require_measurable(
    manifest: Manifest, name: str, model: str, text_format: TextFormat, context_tokens: int
) -> None:
    """Raises ConfigError or DirectionMismatchError unless a model can read the rows of shards."""
    if manifest.frame_tokens % context_tokens:
        raise ConfigError(
            f"the context of {model}, {context_tokens} tokens, does not divide the frames of "
            f"{name} of {manifest.frame_tokens} tokens; give shards built with "
            f"`megaback shards build --frame-tokens {context_tokens}` or a multiple"
        )
    stored, row_tokens = manifest.text_format, manifest.row_tokens
    if row_tokens is not None:
        if text_format.both:
            raise DirectionMismatchError(
                f"{model} is of both directions, which are learned from documents, and {name} "
                "holds instruction examples; give shards of documents, or a model fine-tuned on "
                "examples"
            )
        if context_tokens % row_tokens:
            raise ConfigError(
                f"{name} holds instruction examples in rows of {row_tokens} tokens, of which the "
                f"context of {model}, {context_tokens} tokens, is no multiple; give shards built "
                f"with `megaback instruct build --context-tokens {context_tokens}`"
            )
    elif stored.unit is not Unit.WORD:
        return
    if text_format.both or stored.direction is not text_format.direction:
        if row_tokens is None:
            what = f"unit '{stored.unit.value}'"
            build = "`megaback shards build --unit token`"
        else:
            what = "instruction examples"
            build = f"`megaback instruct build --direction {text_format.direction.value}`"
        raise DirectionMismatchError(
            f"{model} has direction '{text_format.directions.value}', and {name} holds {what} "
            f"in direction '{stored.direction.value}', which cannot be reversed; give shards "
            f"built with {build}"
        )
