"""The mean of several models' weights, tensor by tensor.

Of a run's last checkpoints, this is latest weight averaging (LAWA; Kaddour, 2022, arXiv 2209.14981;
Sanyal et al., 2023, arXiv 2306.03241); of runs from the same initial weights, a uniform model soup
(Wortsman et al., 2022, arXiv 2203.05482).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    RunMismatchError,
)
from megaback.run_folder import CHECKPOINTS_FOLDER, MODEL_CONFIG_NAME, checkpoints_meant_by
from megaback.weights.identity import Average, description_of, identity_of
from megaback.weights.source import WeightSource, open_source


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The last `count` complete checkpoints of a run, oldest first.

    Raises CheckpointMissingError if there are fewer, or if the path is not a run.
    """
    is_run = (run / CHECKPOINTS_FOLDER).is_dir() or run.name == CHECKPOINTS_FOLDER
    if not is_run:
        raise CheckpointMissingError(
            f"{run} is not a run (it has no {CHECKPOINTS_FOLDER}/); `average_last` takes a run's "
            "folder, and `average` takes models and checkpoints by name"
        )
    found = checkpoints_meant_by(run)
    if len(found) < count:
        raise CheckpointMissingError(
            f"{run} has {len(found)} complete checkpoints, not {count}; lower `average_last`, or "
            "train with a higher checkpoint.keep_last"
        )
    return found[-count:]


def average_of(paths: Sequence[Path]) -> WeightSource:
    """The mean of the weights of runs (their newest checkpoints), checkpoints and model folders.

    All are verified first. A read of the result reads one tensor of each and adds them in fp64, so
    that memory does not grow with their number. The description is that of the last one, without
    its val loss. Raises ConfigError for fewer than two or for two of the same weights,
    RunMismatchError for another shape, TokenizerMismatchError, DirectionMismatchError, and the
    errors of `open_source`.
    """
    if len(paths) < 2:
        raise ConfigError(
            "`average` needs two or more models; give them, or a run with `average_last`"
        )
    meant = [_meant_by(path) for path in paths]
    sources = [open_source(path) for path in meant]
    identities = tuple(identity_of(description_of(path)) for path in meant)
    last = sources[-1]
    for path, source in zip(paths[:-1], sources[:-1], strict=True):
        _require_same(source, str(path), last, str(paths[-1]))
    _require_different(meant, sources)

    def mean(name: str) -> Tensor:
        total: Tensor | None = None
        for path, source in zip(meant, sources, strict=True):
            weight = source.read(name)
            if not weight.isfinite().all():
                raise CheckpointCorruptError(
                    f"{name:.200} in {path} has non-finite values; omit it from the average"
                )
            total = weight.double() if total is None else total.add_(weight)
            del weight
        assert total is not None
        return total.div_(len(sources)).to(torch.float32)

    context_tokens = min(source.description.context_tokens for source in sources)
    description = replace(
        last.description,
        context_tokens=context_tokens,
        val_loss=None,
        training=last.description.training
        and replace(last.description.training, val_bits_per_byte=None),
        average=Average(sources=identities),
    )
    return replace(last, description=description, read=mean)


def _meant_by(path: Path) -> Path:
    """A model folder, or the checkpoint of a path: a run that trains may save another one."""
    if (path / MODEL_CONFIG_NAME).is_file():
        return path
    return max(checkpoints_meant_by(path), default=path)


def _require_different(paths: Sequence[Path], sources: Sequence[WeightSource]) -> None:
    """Raises ConfigError for two that have equal weights, which may be in different files.

    Of sources that differ, the smallest tensors are read, one at a time.
    """
    shapes = sources[0].shapes
    equal = [list(range(len(sources)))]
    for name in sorted(shapes, key=lambda name: prod(shapes[name])):
        by_content: dict[tuple[int, bytes], list[int]] = {}
        for group, numbers in enumerate(equal):
            for number in numbers:
                content = hashlib.sha256(
                    sources[number].read(name).float().contiguous().numpy().data
                )
                by_content.setdefault((group, content.digest()), []).append(number)
        equal = [numbers for numbers in by_content.values() if len(numbers) > 1]
        if not equal:
            return
    one, other = (paths[number] for number in equal[0][:2])
    raise ConfigError(
        f"{one} and {other} have the same weights, which would count twice; give them once"
    )


def _require_same(source: WeightSource, this: str, other: WeightSource, that: str) -> None:
    source.description.text_format.require_same(other.description.text_format, this, that)
    mine, theirs = (
        {"vocab_size": one.description.vocab_size, **one.description.shape.architecture()}
        for one in (source, other)
    )
    for name, value in mine.items():
        if value != theirs[name]:
            raise RunMismatchError(
                f"{this} and {that} have different shapes: {name} is {value} and {theirs[name]}; "
                "only weights of one shape can be averaged"
            )
