"""Checkpoint format, verification, and selection of the checkpoint to resume from.

A checkpoint is a folder `step-00000100` with two files per rank, weights and optimizer state (in
the format of `checkpoints.state`), and the tokenizer. It is complete once it has a `meta.json`,
which is written last, atomically, after all ranks have written their files, and has the size and
SHA-256 of every file. Nothing is loaded before it is verified, and nothing is pickled. The file
`latest` is for users; it is not read here.
"""

import json
import logging
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import require_sha256, require_within
from data_pipeline.common.file_names import path_within, plain_name
from data_pipeline.common.limits import MAX_VOCABULARY
from data_pipeline.common.local_paths import with_absolute
from data_pipeline.common.next_command import override
from data_pipeline.common.number_ranges import INT64_MAX, MANY
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
)
from data_pipeline.text.codec import TextFormat
from megaback.branches import BranchPoint
from megaback.checkpoints.safetensors_file import SizeAndHash, size_and_hash
from megaback.checkpoints.saved_runs import (
    RunIndex,
    SavedState,
    index_from_headers,
    require_plausible,
)
from megaback.checkpoints.state import StateDiffersError, refresh_copies, restore
from megaback.config import Config
from megaback.config_messages import sentence
from megaback.distributed.world import World
from megaback.origins import Import
from megaback.run_folder import (
    FILE_NAME,
    MAX_META_BYTES,
    META_NAME,
    OPTIMIZER_PREFIX,
    STEP_FOLDER,
    WEIGHTS_PREFIX,
    checkpoints_meant_by,
    complete_checkpoints,
    refuse_unreadable_model,
    step_name,
)

FORMAT_NAME = "megaback-checkpoint"
FORMAT_VERSION = 2
_LOG = logging.getLogger("megaback.checkpoints")
_MAX_CONFIG_DEPTH = 16


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """Metadata of a checkpoint, sufficient to resume from it or to use it elsewhere."""

    step: int
    updates: int
    """Steps that changed the weights: all but those that were skipped."""
    world_size: int
    zero_stage: int
    precision: str
    vocab_size: int
    text_format: dict[str, str]
    data_fingerprint: str
    config: dict[str, Any]
    val_loss: float | None
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]
    """name: (bytes, sha256)"""
    on_examples: bool = False
    """Whether it was trained on instruction examples, as BackChat is."""
    runs: RunIndex | None = None
    """Index of the files' runs; None in checkpoints of earlier versions."""
    start: str | None = None
    """ID of the start of the run that saved it."""
    order_version: int = 1
    """Version of the order of its rows (`data_pipeline.loading.order`)."""
    branch: BranchPoint | None = None
    """Checkpoint that the run continues, if it is a branch."""
    imported: Import | None = None
    """Origin of the run's first weights, if another program has trained them."""

    @property
    def is_finite(self) -> bool:
        """Whether the val loss, if there is one, is finite."""
        return self.val_loss is None or math.isfinite(self.val_loss)

    @property
    def format(self) -> TextFormat:
        return TextFormat.from_dict(self.text_format)


_META = TypeAdapter(CheckpointMeta)


def complete(
    target: Path,
    meta: CheckpointMeta,
    files: Mapping[str, SizeAndHash],
    publish: Callable[[Path, Path], None] | None = None,
) -> None:
    """Complete a checkpoint whose files are all written, by writing meta.json atomically.

    `publish` renames it.
    """
    meta = replace(meta, files=dict(sorted(files.items())))
    if not meta.is_finite:
        meta = replace(meta, val_loss=str(meta.val_loss))  # type: ignore[arg-type] # JSON has no NaN
    fields = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(meta)}
    write_text(target / META_NAME, json.dumps(fields, indent=2) + "\n", publish)


def newest_checkpoint(run: Path, world: World) -> tuple[Path, CheckpointMeta] | None:
    """The newest checkpoint of a run that verifies; None if there is no complete one.

    Every rank hashes part of the files, and all ranks return the same. Raises
    CheckpointCorruptError if there are complete checkpoints and none of them verifies.
    """
    seen = world.run_collectively(complete_checkpoints, run)
    # Ranks may temporarily see different contents of a shared disk.
    found = world.of_first(seen, list[Path])
    problems: list[str] = []
    for target in reversed(found):
        meta, reported = verify_together(target, world)
        if not reported and meta is not None:
            if world.is_first and problems:
                _LOG.warning("%s; going back to %s", problems[0], target.name)
            return target, meta
        problems.extend(reported)
    if problems:
        raise CheckpointCorruptError(
            f"{problems[0]}; no other checkpoint of {run} verifies either: restore one, or start "
            "again in another run folder"
        )
    return None


def verify_together(target: Path, world: World) -> tuple[CheckpointMeta | None, list[str]]:
    """Metadata of a checkpoint, and what is wrong with it on any rank. Collective.

    Every rank hashes part of the files.
    """
    meta, problem = None, None
    try:
        meta = read_meta(target)
        verify_files(target, meta, world.rank, world.size)
    except (CheckpointCorruptError, OSError) as error:
        problem = str(error)
    return meta, [text for text in world.gather(problem, str | None) if text]


def load_into_engine(
    engine: Any, target: Path, meta: CheckpointMeta, world: World, *, only_weights: bool = False
) -> None:
    """Restore weights and optimizer state of a verified checkpoint of any world size and stage.

    Collective. Ends all ranks when it was saved with another optimizer or model.
    """
    saved = saved_state(target, meta, only_weights=only_weights)
    updates = 0 if only_weights else meta.updates
    world.run_collectively(_restore, engine, target, saved, updates)
    refresh_copies(engine)
    now = (world.size, engine.zero_optimization_stage())
    if world.is_first and now != (meta.world_size, meta.zero_stage):
        _LOG.info(
            "%s of %d ranks at ZeRO stage %d is resumed with %d ranks at stage %d",
            *(target.name, meta.world_size, meta.zero_stage, *now),
        )


def _restore(engine: Any, target: Path, saved: SavedState, updates: int) -> None:
    try:
        restore(engine, saved, updates)
    except StateDiffersError as error:
        others = f" ({len(error.differing)} differ)" if len(error.differing) > 1 else ""
        raise RunMismatchError(
            f"{target} was saved by a run with another model or optimizer: {error.differing[0]}"
            f"{others}; use the same ones, or start another run from its weights with "
            f"{shlex.quote(override('init_from', target))}"
        ) from None


def saved_state(target: Path, meta: CheckpointMeta, *, only_weights: bool = False) -> SavedState:
    """Weights and optimizer state of a verified checkpoint, or the weights alone."""
    index = meta.runs
    if index is None:
        prefixes = (WEIGHTS_PREFIX,) if only_weights else (WEIGHTS_PREFIX, OPTIMIZER_PREFIX)
        names = [name for name in meta.files if name.startswith(prefixes)]
        index = index_from_headers(target / name for name in names)
    return SavedState(target, index, only_weights=only_weights)


def find_checkpoint(path: Path, part: int = 0, parts: int = 1) -> tuple[Path, CheckpointMeta]:
    """The verified checkpoint of a path: a run, its folder of checkpoints, or one step's folder.

    `checkpoints/best` and `latest` mean the checkpoint that they name. Of several ranks, each
    verifies a part of the files. Raises CheckpointMissingError or CheckpointCorruptError.
    """
    candidates = checkpoints_meant_by(path)
    if not candidates:
        refuse_unreadable_model(path)
        raise CheckpointMissingError(
            f"{with_absolute(path)} holds no complete checkpoint (no step-*/{META_NAME}); "
            "give a run's folder, or train until a checkpoint is saved"
        )
    newest = candidates[-1]
    try:
        meta = read_meta(newest)
        verify_files(newest, meta, part, parts)
    except CheckpointCorruptError as error:
        others = ", ".join(other.name for other in candidates[:-1])
        advice = (
            f"to use an older checkpoint, give its folder ({others})" if others else "restore it"
        )
        raise CheckpointCorruptError(f"{error}; {advice}") from None
    return newest, meta


def read_meta(target: Path) -> CheckpointMeta:
    """Read meta.json. Raises CheckpointCorruptError if it is invalid or of another version."""
    path = target / META_NAME
    try:
        return parse_meta(read_file(path, MAX_META_BYTES), target.name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"{path} is not the metadata of a checkpoint ({reason})"
        ) from None


def parse_meta(text: bytes, folder: str) -> CheckpointMeta:
    """Parse the meta.json of a checkpoint in a folder of that name. Raises ValueError."""
    try:
        fields = json.loads(text)
        if (fields.pop("format"), fields.pop("version")) != (FORMAT_NAME, FORMAT_VERSION):
            raise ValueError("another format or version")
        meta = _META.validate_python(fields)
        _ = meta.format
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _require_plausible(meta)
    if folder != step_name(meta.step) and STEP_FOLDER.fullmatch(folder):
        raise ValueError(f"it is for step {meta.step}")
    return meta


def _require_plausible(meta: CheckpointMeta) -> None:
    """Raises ValueError for values that no run writes."""
    require_within("step", meta.step, 0, INT64_MAX)
    require_within("updates", meta.updates, 0, INT64_MAX)
    require_within("world_size", meta.world_size, 1, int(MANY.max))
    require_within("zero_stage", meta.zero_stage, 0, 3)
    require_within("vocab_size", meta.vocab_size, 1, MAX_VOCABULARY)
    require_within("order_version", meta.order_version, 1, INT64_MAX)
    for name, (num_bytes, sha256) in meta.files.items():
        plain_name(name, FILE_NAME)
        require_within(f"the size of {name}", num_bytes, 0, INT64_MAX)
        require_sha256(f"the hash of {name}", sha256)
    if meta.branch is not None:
        meta.branch.require_plausible()
    if meta.imported is not None:
        meta.imported.require_plausible()
    if meta.runs is not None:
        require_plausible(meta.runs, meta.world_size, meta.files)
    _require_shallow(meta.config, _MAX_CONFIG_DEPTH)


def _require_shallow(value: object, depth: int) -> None:
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError("its config is nested too deeply")
        for one in value.values() if isinstance(value, dict) else value:
            _require_shallow(one, depth - 1)


def config_of(target: Path, meta: CheckpointMeta) -> Config:
    """The config that a checkpoint was trained with. Raises CheckpointCorruptError."""
    try:
        return Config.model_validate(meta.config)
    except ValidationError as error:
        reason = sentence(error, Config)
        raise CheckpointCorruptError(
            f"{target / META_NAME} has a config that this version cannot read ({reason}); use the "
            "version that wrote it"
        ) from None


def verify_files(target: Path, meta: CheckpointMeta, part: int = 0, parts: int = 1) -> None:
    """Verify size and hash of every `parts`-th file. Raises CheckpointCorruptError, OSError."""
    for name in sorted(meta.files)[part::parts]:
        try:
            path = path_within(target, name, FILE_NAME)
        except ValueError as error:
            raise CheckpointCorruptError(f"cannot read the checkpoint {target}: {error}") from None
        num_bytes, sha256 = meta.files[name]
        is_there = path.is_file()
        # A file of another size need not be hashed.
        is_same = is_there and path.stat().st_size == num_bytes
        if not is_same or size_and_hash(path) != (num_bytes, sha256):
            what = "is not the file that was saved" if is_there else "is missing"
            raise CheckpointCorruptError(f"the checkpoint {target} is damaged: {name} {what}")
