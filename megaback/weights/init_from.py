"""Initial weights from a model folder, run or checkpoint (`init_from`).

Its text format and shape are compared with the run's before the run's model is created and weights
are loaded.
"""

from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import CheckpointMissingError, RunMismatchError
from data_pipeline.text.codec import TextFormat
from megaback.config import ModelSection
from megaback.run_folder import MODEL_CONFIG_NAME
from megaback.weights.model_folder import ModelDescription, read_description
from megaback.weights.source import WeightSource, open_checkpoint, open_source


def open_base(
    base: Path,
    shape: ModelSection,
    vocab_size: int,
    text_format: TextFormat,
    run: str,
    part: int = 0,
    parts: int = 1,
    address: str | None = None,
) -> WeightSource:
    """Weights of a base: a model's folder, a run, or one of its checkpoints.

    `shape`, `vocab_size` and `text_format` are the run's; `run` is its name for messages, and
    `address` that from which the base was fetched. Of several ranks, each verifies a part of the
    files. Raises CheckpointMissingError, CheckpointCorruptError, TokenizerMismatchError,
    DirectionMismatchError, RunMismatchError.
    """
    if (base / MODEL_CONFIG_NAME).is_file():
        _require_fit(read_description(base), shape, vocab_size, base, text_format, run)
        return open_source(base, part, parts)
    if not base.exists():
        raise CheckpointMissingError(
            f"init_from {base} does not exist; give a folder of `megaback convert`, a run, or one "
            "of its checkpoints"
        )
    checkpoint = open_checkpoint(base, part, parts)
    shown = address or base
    _require_fit(checkpoint.description, shape, vocab_size, shown, text_format, run)
    return checkpoint


def _require_fit(
    description: ModelDescription,
    shape: ModelSection,
    vocab_size: int,
    base: Path | str,
    text_format: TextFormat,
    run: str,
) -> None:
    base_format = description.text_format
    if description.is_foreign:  # it may be trained in another direction
        base_format = replace(base_format, direction=text_format.direction, unit=text_format.unit)
    base_format.as_base_of(text_format).require_same(text_format, f"init_from {base}", run)
    theirs = {"vocab_size": description.vocab_size, **description.shape.architecture()}
    ours = {"vocab_size": vocab_size, **shape.architecture()}
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        name = differing[0]
        raise RunMismatchError(
            f"init_from {base} has another shape than the config's model: {name} is "
            f"{theirs[name]} there and {ours[name]} here ({len(differing)} differ: "
            f"{', '.join(differing)}); change the config's model to match"
        )
