"""Weights of DeepSpeed's own checkpoints: ZeRO stages 0 to 3 and universal ones.

They equal, bit for bit, those of DeepSpeed's zero_to_fp32.py, whose layout this is: at stages 1 and
2 the ranks' partitions of a parameter group are one flat tensor of all its parameters, at stage 3
each parameter is cut into as many parts as there are ranks. One parameter is in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import CheckpointCorruptError
from megaback.weights.deepspeed_files import (
    Inert,
    load,
    model_files,
    optimizer_files,
    universal_folder,
)

Shape = tuple[int, ...]
_Read = Callable[[], Tensor]


class DeepSpeedWeights:
    """Reader of the parameters of a checkpoint folder, such as global_step1000."""

    def __init__(self, folder: Path) -> None:
        """Map the files. Raises CheckpointCorruptError."""
        self._folder = folder
        self._readers: dict[str, tuple[Shape, torch.dtype, _Read]] = {}
        models = [load(path) for path in model_files(folder)]
        try:
            self.step: int | None = models[0].get("global_steps")
            universal, optimizers = universal_folder(folder), optimizer_files(folder)
            if universal is not None:
                self.kind = "DeepSpeed, universal"
                self._add_universal(models[0], universal)
            elif optimizers:
                states = [load(path)["optimizer_state_dict"] for path in optimizers]
                self.kind = f"DeepSpeed, ZeRO stage {_stage_of(states[0])}"
                self._add_sharded(models, states)
            else:
                self.kind = "DeepSpeed, without optimizer state"
                self._add_whole(models[0])
            for name, other in (models[0].get("shared_params") or {}).items():
                if other in self._readers:
                    self._readers.setdefault(name, self._readers[other])
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise CheckpointCorruptError(
                f"the checkpoint {folder} has another layout than DeepSpeed's "
                f"({type(error).__name__}: {error}); convert it to safetensors with "
                "its zero_to_fp32.py, and import these"
            ) from None
        self._prefix = _prefix_of(self._readers)

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each parameter; prefixes of wrappers are removed."""
        for name, (shape, _, _) in self._readers.items():
            yield name.removeprefix(self._prefix), shape

    def read(self, name: str) -> Tensor:
        """Read a parameter. Raises KeyError if there is none."""
        shape, _, read = self._readers[self._prefix + name]
        return read().detach().reshape(shape)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a parameter."""
        return self._readers[self._prefix + name][1]

    def _add(self, name: str, shape: Sequence[int], dtype: torch.dtype, read: _Read) -> None:
        self._readers[name] = (tuple(shape), dtype, read)

    def _add_whole(self, model: Mapping[str, Any]) -> None:
        buffers = set(model.get("buffer_names") or ())
        for name, tensor in model["module"].items():
            if name not in buffers:
                if tensor.numel() == 0:
                    raise self._damaged("its *_optim_states.pt are missing")
                self._add(name, tensor.shape, tensor.dtype, partial(_whole, tensor))

    def _add_universal(self, model: Mapping[str, Any], folder: Path) -> None:
        shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
        for name, shape in shapes.items():
            path = folder / name / "fp32.pt"
            if not path.is_file():
                raise self._damaged(f"{path.relative_to(self._folder)} is missing")
            self._add(name, shape, torch.float32, partial(_universal, path, prod(shape)))

    def _add_sharded(self, models: list[Any], states: list[Any]) -> None:
        ranks, stage = _partitions(states[0]), _stage_of(states[0])
        if len(states) != ranks:
            raise self._damaged(f"it has the files of {len(states)} of {ranks} ranks")
        if stage == 3 and len(models) != ranks:
            raise self._damaged(f"it has the model files of {len(models)} of {ranks} ranks")
        self._add_frozen(models, stage)
        shapes = models[0]["param_shapes"]
        if stage == 3:
            self._add_parts(shapes, [state["fp32_flat_groups"] for state in states])
            return
        paddings = states[0].get("param_alignment_paddings") or [None] * len(shapes)
        for number, (group, padding) in enumerate(zip(shapes, paddings, strict=True)):
            parts = [state["single_partition_of_fp32_groups"][number] for state in states]
            self._add_group(group, parts, padding)

    def _add_frozen(self, models: list[Any], stage: int) -> None:
        for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
            owners = models if stage == 3 else models[:1]
            parts = [model["frozen_param_fragments"][name] for model in owners]
            self._add(name, shape, parts[0].dtype, partial(_joined, parts, 0, prod(shape)))

    def _add_group(
        self, shapes: Mapping[str, Sequence[int]], parts: list[Tensor], padding: list[int] | None
    ) -> None:
        """Parameters of a group of stage 1 or 2: one after the other in all ranks' partitions."""
        start = 0
        gaps = padding or [0] * len(shapes)
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            self._add(name, shape, parts[0].dtype, partial(_joined, parts, start, prod(shape)))
            start += prod(shape) + gap
        # ZeRO pads a group to twice the number of ranks; both ends are compared after rounding.
        unit = 2 * len(parts)
        if ceil(start / unit) != ceil(sum(part.numel() for part in parts) / unit):
            raise self._damaged("its partitions do not have the sizes of its parameters")

    def _add_parts(
        self, groups: list[Mapping[str, Sequence[int]]], flats: list[list[Tensor]]
    ) -> None:
        """Parameters of stage 3: a part of each at the same place of every rank's flat tensors."""
        start = 0
        for name, shape in ((name, group[name]) for group in groups for name in group):
            length = ceil(prod(shape) / len(flats))
            self._add(
                name, shape, flats[0][0].dtype, partial(_zipped, flats, start, length, prod(shape))
            )
            start += length
        if any(sum(part.numel() for part in flat) != start for flat in flats):
            raise self._damaged("its partitions do not have the sizes of its parameters")

    def _damaged(self, reason: str) -> CheckpointCorruptError:
        return CheckpointCorruptError(
            f"the checkpoint {self._folder} is incomplete: {reason}; copy the whole folder"
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _zipped(flats: Sequence[Sequence[Tensor]], start: int, length: int, size: int) -> Tensor:
    """The same slice of every rank's flat tensors, without the padding at the end."""
    return torch.cat([_joined(flat, start, length) for flat in flats])[:size]


def _joined(parts: Sequence[Tensor], start: int, length: int) -> Tensor:
    """A slice of flat tensors that follow each other."""
    edges = [0, *accumulate(part.numel() for part in parts)]
    pieces = [
        part.detach().reshape(-1)[max(start - low, 0) : start + length - low]
        for part, (low, high) in zip(parts, pairwise(edges), strict=True)
        if low < start + length and high > start
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _universal(path: Path, size: int) -> Tensor:
    """A parameter's fp32 weights; those of stage 3 are flat, and may have padding."""
    content = load(path)
    tensor: Tensor = content["param"] if isinstance(content, dict) else content
    if tensor.numel() < size:
        raise CheckpointCorruptError(
            f"{path} has {tensor.numel():,} of {size:,} weights; copy the whole checkpoint"
        )
    return tensor.detach().reshape(-1)[:size]


def _stage_of(state: Mapping[str, Any]) -> int:
    # DeepSpeed's optimizer for bf16 at stage 1 names no stage.
    stage: Any = state.get("zero_stage", 1)
    return int(stage.arguments[0] if isinstance(stage, Inert) else stage)


def _partitions(state: Mapping[str, Any]) -> int:
    count = state["partition_count"]
    return int(max(count) if isinstance(count, list | tuple) else count)


def _prefix_of(names: Mapping[str, object]) -> str:
    """Prefix that wrappers have put before the names of transformers, such as `module.`."""
    suffix = "model.embed_tokens.weight"
    found = [name for name in names if name.endswith(suffix)]
    return found[0].removesuffix(suffix) if len(found) == 1 else ""
