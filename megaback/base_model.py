"""What a run starts from when it does not start from nothing: a model's folder, or a checkpoint.

Both are treated alike: the text format and the shape are compared with the run's before any weight
is loaded.
"""

from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import CheckpointMissingError, RunMismatchError
from data_pipeline.text import TextFormat
from megaback.model import ReverseGPT
from megaback.model_folder import CONFIG_NAME, ModelDescription, load_weights, read_description
from megaback.weight_source import open_checkpoint


def load_base(model: ReverseGPT, base: Path, text_format: TextFormat, run: str) -> None:
    """Fill a model with the weights of a base: a model's folder, a run, or one of its checkpoints.

    `text_format` is that of the run, and `run` how it is called in messages. Raises
    CheckpointMissingError, CheckpointCorruptError, TokenizerMismatchError, DirectionMismatchError,
    RunMismatchError.
    """
    if (base / CONFIG_NAME).is_file():
        _require_fit(read_description(base), model, base, text_format, run)
        load_weights(model, base)
        return
    if not base.exists():
        raise CheckpointMissingError(
            f"init_from {base} is not there; name a folder of `megaback convert`, a run, or one of "
            "its checkpoints"
        )
    checkpoint = open_checkpoint(base)
    _require_fit(checkpoint.description, model, base, text_format, run)
    checkpoint.fill(model)


def _require_fit(
    description: ModelDescription, model: ReverseGPT, base: Path, text_format: TextFormat, run: str
) -> None:
    base_format = description.text_format
    if description.is_foreign:  # it may learn another direction
        base_format = replace(base_format, direction=text_format.direction, unit=text_format.unit)
    base_format.require_same(text_format, f"init_from {base}", run)
    theirs = {"vocab_size": description.vocab_size, **description.shape.architecture()}
    ours = {"vocab_size": model.vocab_size, **model.shape.architecture()}
    differing = [name for name in ours if theirs[name] != ours[name]]
    if differing:
        name = differing[0]
        raise RunMismatchError(
            f"init_from {base} has another shape than the config's model: {name} is "
            f"{theirs[name]} there and {ours[name]} here ({len(differing)} differ: "
            f"{', '.join(differing)}); make the config's model equal"
        )
