"""Branches: runs that continue a checkpoint of another run, their trunk (`branch_from`).

A branch's point of departure is read from the trunk's checkpoint at its first start, and from its
own checkpoints afterwards, so that it does not need the trunk any longer. Loads no torch.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.common.checked_json import parse_json, require_sha256, require_within
from data_pipeline.common.differences import differing_keys, shown_values
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
)
from data_pipeline.loading.order import ORDER_VERSION
from data_pipeline.redaction import shown_url
from data_pipeline.text.codec import TextFormat
from megaback.config import Config, Kept
from megaback.config_data import DEFAULT_FORWARD_SHARE
from megaback.copy_location import find_base_copy
from megaback.run_folder import (
    BRANCHES_FOLDER,
    HISTORY_NAME,
    MAX_META_BYTES,
    META_NAME,
    checkpoints_meant_by,
    complete_checkpoints,
)

_ORDER_KEYS = (
    "batch.context_tokens",
    "data.rows",
    "data.lanes",
    "data.window_frames",
    "data.forward_share",
    "training.seed",
)
"""Keys that determine the order of the rows, besides the data sets and the batch."""


@dataclass(frozen=True, kw_only=True)
class BranchPoint:
    """Checkpoint that a branch continues, and what it continues of it."""

    checkpoint: str
    """Path of the trunk's checkpoint."""
    sha256: str
    """Hash of its meta.json, which has the hashes of all other files."""
    trunk_step: int
    kept: tuple[Kept, ...]
    step: int
    """Number of steps before the branch's first: the trunk's, or 0 without its schedule."""
    tokens: int
    """Number of tokens of those steps."""
    rows: int
    """Number of rows of the order that were read before; 0 without the trunk's data."""
    order_rows: int
    """Rows per step of the run that chose the number of lanes."""
    data_fingerprint: str
    """Fingerprint of the trunk's data sets."""
    text_format: dict[str, str]
    data: str | None = None
    """The trunk's data sets and their fingerprint, for records; None in earlier versions."""
    updates: int = 0
    """Number of the trunk's updates that the optimizer's state counts; 0 without it."""

    def require_plausible(self) -> None:
        """Raises ValueError for values that no run writes."""
        for name in ("trunk_step", "step", "tokens", "rows", "updates"):
            require_within(name, getattr(self, name), 0, INT64_MAX)
        require_within("order_rows", self.order_rows, 1, INT64_MAX)
        require_sha256("the hash of the trunk's checkpoint", self.sha256)

    def tokens_at(self, step: int, step_tokens: int) -> int:
        """Number of tokens up to a step of the branch."""
        return self.tokens + (step - self.step) * step_tokens

    def continues(self, part: Kept) -> bool:
        return part in self.kept

    def without(self, part: Kept) -> str:
        """The value of `keep` without one part, for messages."""
        return f"keep=[{', '.join(kept for kept in self.kept if kept != part)}]"

    def identity(self) -> dict[str, Any]:
        """Path, step, hash and data of the trunk's checkpoint, and what is kept, for records."""
        return {
            "path": self.checkpoint,
            "step": self.trunk_step,
            "sha256": self.sha256,
            "data": self.data,
            "kept": list(self.kept),
        }

    @property
    def description(self) -> str:
        """Checkpoint, step and what is kept, for messages."""
        return f"{self.checkpoint} (step {self.trunk_step:,}; keeps {', '.join(self.kept)})"


_POINT = TypeAdapter(BranchPoint)


def find_branch_point(config: Config) -> BranchPoint | None:
    """The point at which a run left its trunk; None if it is no branch.

    Raises CheckpointMissingError or CheckpointCorruptError if the trunk has no checkpoint to begin
    from, and RunMismatchError if the config does not fit it, or is not the one that it began with.
    """
    for own in _own_points(config.run):
        return began_as(config, own)
    return None if config.branch_from is None else _leave(config, config.branch_from)


def branches_of(run: Path) -> list[Path]:
    """Folders of the branches below a run, oldest first by name and number."""
    found = [path.parent for path in (run / BRANCHES_FOLDER).glob(f"*/{HISTORY_NAME}")]
    return sorted(found, key=_by_number)


def _by_number(branch: Path) -> tuple[float, str]:
    try:
        return float(branch.name), branch.name
    except ValueError:
        return float("inf"), branch.name


def recorded_branch_point(run: Path) -> BranchPoint | None:
    """The point at which a run left its trunk, by its newest readable checkpoint."""
    return next(_own_points(run), None)


def _own_points(run: Path) -> Iterator[BranchPoint | None]:
    """The branch point in each readable checkpoint of a run, newest first."""
    for own in reversed(complete_checkpoints(run)):
        with suppress(OSError, ValueError):
            yield _point_of(_read(own)[0])


def began_as(config: Config, point: BranchPoint | None) -> BranchPoint | None:
    """The point at which a run began. Raises RunMismatchError for the config of another run."""
    if point is None and config.branch_from is not None:
        raise RunMismatchError(
            f"the run {config.run} did not begin as a branch, and the config has branch_from = "
            f"{config.branch_from}; use another run folder for the branch"
        )
    if point is not None and config.branch_from is not None and point.kept != config.keep:
        raise RunMismatchError(
            f"the run {config.run} began with keep = {', '.join(point.kept)}, and the config has "
            f"{', '.join(config.keep)}; use the same value, or another run folder"
        )
    return point


def _leave(config: Config, branch_from: Path | str) -> BranchPoint:
    """The point at which a new branch leaves its trunk."""
    target, read = _checkpoint_meant_by(branch_from)
    try:
        fields, sha256 = read()
        before = _point_of(fields)
        step, trunk = fields["step"], Config.model_validate(fields["config"])
        updates = fields["updates"] if "optimizer" in config.keep else 0
        require_within("step", step, 0, INT64_MAX)
        require_within("updates", updates, 0, INT64_MAX)
        fingerprint, text_format = str(fields["data_fingerprint"]), dict(fields["text_format"])
        TextFormat.from_dict(text_format)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(
            f"branch_from {target} has no {META_NAME} that this version can read "
            f"({type(error).__name__}); use another checkpoint"
        ) from None
    batch, own_steps = trunk.batch, step - (before.step if before is not None else 0)
    has_schedule, has_data = "schedule" in config.keep, "data" in config.keep
    point = BranchPoint(
        checkpoint=target,
        sha256=sha256,
        trunk_step=step,
        kept=config.keep,
        step=step if has_schedule else 0,
        tokens=_tokens(trunk, before, own_steps) if has_schedule else 0,
        rows=_rows(before) + own_steps * batch.global_batch_rows if has_data else 0,
        order_rows=_order_rows(trunk, before) if has_data else config.batch.global_batch_rows,
        data_fingerprint=fingerprint,
        text_format=text_format,
        data=trunk.data.with_fingerprint(fingerprint),
        updates=updates,
    )
    _require_fit(config, trunk, point)
    if has_data and config.data.depends_on_length:
        _refuse(
            differing_keys(
                trunk.model_dump(), config.model_dump(), ["training.steps", "training.epochs"]
            ),
            f"branch_from {target} has read data with weights by fraction of",
            "use the same length, set data.weight_positions to tokens in both, or restart the "
            f"data: {point.without('data')}",
        )
    version = fields.get("order_version", 1)
    if has_data and version != ORDER_VERSION:
        _refuse(
            {"order_version": (version, ORDER_VERSION)},
            f"branch_from {target} has read its rows with",
            f"use the megaback that began it, or restart the data: {point.without('data')}",
        )
    return point


def _checkpoint_meant_by(
    branch_from: Path | str,
) -> tuple[str, Callable[[], tuple[dict[str, Any], str]]]:
    """Path or address of the trunk's checkpoint, and a reader of its metadata."""
    if isinstance(branch_from, str):
        if copy := find_base_copy(branch_from):
            return copy[0].name, partial(_parse, copy[1])
    elif found := checkpoints_meant_by(branch_from):
        return str(found[-1]), partial(_read, found[-1])
    elif not branch_from.exists():
        raise CheckpointMissingError(
            f"branch_from {branch_from} does not exist in {Path.cwd()}; give the path of a run, of "
            "one of its checkpoints, or of its copies"
        )
    raise CheckpointMissingError(
        f"branch_from {shown_url(str(branch_from))} holds no complete checkpoint; give a run, or "
        "one of its checkpoints that has not been deleted"
    )


def _tokens(trunk: Config, before: BranchPoint | None, own_steps: int) -> int:
    earlier = before.tokens if before is not None else 0
    return earlier + own_steps * trunk.batch.global_batch_rows * trunk.batch.context_tokens


def _rows(before: BranchPoint | None) -> int:
    return before.rows if before is not None else 0


def _order_rows(trunk: Config, before: BranchPoint | None) -> int:
    return before.order_rows if before is not None else trunk.batch.global_batch_rows


def _require_fit(config: Config, trunk: Config, point: BranchPoint) -> None:
    """Raises RunMismatchError for a config that cannot continue what it keeps."""
    where = f"branch_from {point.checkpoint}"
    ours, theirs = ({"model": one.model.architecture()} for one in (config, trunk))
    _refuse(differing_keys(theirs, ours, ["model"]), f"{where} has", "change the config's model")
    _refuse(
        differing_keys(trunk.model_dump(), config.model_dump(), ["finetune"]),
        f"{where} was trained with",
        "use the same values, or start from its weights alone, with init_from",
    )
    if point.continues("optimizer"):
        _refuse(
            differing_keys(trunk.model_dump(), config.model_dump(), ["optimizer.name"]),
            f"{where} has the state of",
            f"use the same optimizer, or begin with a new one: {point.without('optimizer')}",
        )
    if point.continues("data"):
        _refuse(
            differing_keys(_order_fields(trunk), _order_fields(config), _ORDER_KEYS),
            f"{where} has read its rows with",
            f"use the same value, or restart the data: {point.without('data')}",
        )


def _refuse(differing: dict[str, tuple[Any, Any]], has: str, advice: str) -> None:
    if differing:
        raise RunMismatchError(
            f"{has} {shown_values(differing, 0)}, and this run has {shown_values(differing, 1)}; "
            f"{advice}"
        )


def _order_fields(config: Config) -> dict[str, Any]:
    fields = config.model_dump(mode="json")
    share = config.data.forward_share or DEFAULT_FORWARD_SHARE
    return fields | {"data": fields["data"] | {"forward_share": share}}


def _read(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """Fields of a meta.json, and its hash. Raises OSError, ValueError."""
    return _parse(read_file(checkpoint / META_NAME, MAX_META_BYTES))


def _parse(content: bytes) -> tuple[dict[str, Any], str]:
    fields = parse_json(content)
    if not isinstance(fields, dict):
        raise ValueError("it is not an object")
    return fields, hashlib.sha256(content).hexdigest()


def _point_of(fields: dict[str, Any]) -> BranchPoint | None:
    """The branch point in a meta.json. Raises ValueError."""
    if fields.get("branch") is None:
        return None
    try:
        point = _POINT.validate_python(fields["branch"])
    except ValidationError as error:
        raise ValueError(f"branch: {error.error_count()} invalid fields") from None
    point.require_plausible()
    return point
