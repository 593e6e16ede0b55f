"""Names of all files in a run's folder, a checkpoint and a model's folder, defined only here.

`checkpoints/best` and `checkpoints/latest` are marks: files that name a checkpoint in their folder.
Loads no torch.
"""

import re
from pathlib import Path

from data_pipeline.common.file_names import path_within
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from data_pipeline.text.tokenizer import ANY_TOKENIZER, TOKENIZER_NAMES

CONFIG_COPY_NAME = "config.yaml"
"""The run's config, resolved, or the user's own."""
RESOLVED_COPY_NAME = "config.resolved.yaml"
"""The run's config, resolved, where its `config.yaml` is the user's own."""
LOCK_NAME = ".lock"
"""Lock file, held by the process that trains in the run's folder."""
START_NAME = ".start"
"""The run's newest start."""
METRICS_NAME = "metrics.jsonl"
SAMPLES_NAME = "samples.jsonl"
"""Texts written at validations."""
HISTORY_NAME = "history.jsonl"
EXIT_NAME = "exit.json"
BAD_NODES_NAME = "bad_nodes.txt"
"""Nodes that failed the preflight, one per line."""
PREFLIGHT_NAME = "preflight.json"
PREFLIGHT_FOLDER = ".preflight"
"""Files by which nodes test whether they share the disk."""
ROLLED_BACK_PREFIX = "rolled-back-from-"
"""Begin of the name of a folder of checkpoints that `megaback rollback` has set aside."""
SKIPPED_STEPS_NAME = "skipped_steps.json"
MAX_SKIPPED_STEPS_BYTES = 1 << 20
"""The file holds first and last of each range of steps that `megaback rollback` excluded."""
WANDB_ID_NAME = "wandb_id.txt"
WANDB_FOLDER = "wandb"
TENSORBOARD_FOLDER = "tensorboard"

HEARTBEATS_FOLDER = "heartbeats"
HEARTBEAT_PREFIX = "rank-"

COLLECTIVES_FOLDER = "collectives"
"""Last collectives of ranks that lost the others."""

MEMORY_FOLDER = "memory"
"""State of the allocators of ranks that ran out of memory."""

SUBMITTED_FOLDER = "submitted"
SUBMISSION_NAME = "submission.json"
CHANGES_NAME = "changes.diff"
LOGS_FOLDER = "logs"

CHECKPOINTS_FOLDER = "checkpoints"
META_NAME = "meta.json"
MAX_META_BYTES = 1 << 24
"""Maximum size of meta.json, enough for about 30,000 ranks."""
LATEST_NAME = "latest"
BEST_NAME = "best"
"""Mark that names the checkpoint with the lowest val loss, which is never deleted."""
STEP_PREFIX = "step-"
FETCHED_NAME = ".fetched.partial"
"""Checkpoint that is being fetched from `checkpoint.copy_to`."""
BASE_FOLDER = ".base"
"""Checkpoint that a run begins from, fetched from a URL, until it is loaded."""
TENSORS_SUFFIX = ".safetensors"
WEIGHTS_PREFIX = "weights-"
OPTIMIZER_PREFIX = "optimizer-"
FROZEN_NAME = f"base{TENSORS_SUFFIX}"
"""Frozen weights of a run with LoRA, beside its checkpoints and, as the same file, in each."""
STEP_FOLDER = re.compile(rf"{STEP_PREFIX}[0-9]{{8}}")
FILE_NAME = re.compile(
    rf"({WEIGHTS_PREFIX}|{OPTIMIZER_PREFIX})[0-9]{{5,}}{re.escape(TENSORS_SUFFIX)}"
    rf"|{re.escape(FROZEN_NAME)}|{ANY_TOKENIZER}"
)
"""File names that a checkpoint's meta.json may list."""
CHECKPOINT_FILE = re.compile(rf"{FILE_NAME.pattern}|{re.escape(META_NAME)}")
"""Names of the files in a checkpoint: other files in its folder are not removed with it."""

MODEL_CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SUMS_NAME = "SHA256SUMS"
GGUF_NAME = "model.gguf"
ADAPTER_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
"""File of a peft adapter, which has no config.json."""
HF_TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
"""File that only folders for transformers have."""

CONVERTED_FOLDER = "converted"
"""Model folders converted from a run's checkpoints."""
CONVERSION = re.compile(rf"{STEP_FOLDER.pattern}-[0-9a-f]{{12}}")
CONVERSION_FILE = re.compile(
    "|".join(map(re.escape, (MODEL_CONFIG_NAME, *TOKENIZER_NAMES, SUMS_NAME, INDEX_NAME)))
    + rf"|model(-[0-9]{{5}}-of-[0-9]{{5}})?{re.escape(TENSORS_SUFFIX)}"
)

BRANCHES_FOLDER = "branches"
"""Runs that leave the run of this folder, as those of `optimizer.decay_at`."""

_MAX_MARK_BYTES = 256


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"{STEP_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix(STEP_PREFIX))


def part_of_weights(number: int, count: int) -> str:
    """The name of one of several files of a model's weights, numbered from 1."""
    return f"model-{number:05d}-of-{count:05d}{TENSORS_SUFFIX}"


def heartbeat_path(run: Path, rank: int) -> Path:
    """Path of a rank's heartbeat."""
    return run / HEARTBEATS_FOLDER / f"{HEARTBEAT_PREFIX}{rank:05d}.json"


def collectives_path(run: Path, rank: int) -> Path:
    """Path of the record of a rank's last collectives."""
    return run / COLLECTIVES_FOLDER / f"rank-{rank:05d}.jsonl"


def collectives_paths(run: Path) -> list[Path]:
    """Paths of such records, by rank."""
    return sorted((run / COLLECTIVES_FOLDER).glob("rank-*.jsonl"))


def memory_path(run: Path, rank: int, suffix: str) -> Path:
    """Path of a file about the memory of a rank that ran out of it."""
    return run / MEMORY_FOLDER / f"rank-{rank:05d}{suffix}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return _complete_in(run / CHECKPOINTS_FOLDER)


def _complete_in(folder: Path) -> list[Path]:
    return sorted(
        path.parent
        for path in folder.glob(f"{STEP_PREFIX}*/{META_NAME}")
        if STEP_FOLDER.fullmatch(path.parent.name)
    )


def newest_checkpoint_step(run: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    return max(map(step_of, complete_checkpoints(run)), default=0)


def refuse_unreadable_model(path: Path) -> None:
    """Raises CheckpointMissingError for a path whose model is for other programs."""
    if path.suffix == ".gguf" or (path / GGUF_NAME).is_file():
        raise CheckpointMissingError(
            f"{path} is a GGUF export, which is for llama.cpp and is not read again; give the "
            "run, a checkpoint, or a folder that `megaback convert --to full` or hf wrote"
        )
    if (path / ADAPTER_NAME).is_file():
        raise CheckpointMissingError(
            f"{path} is an adapter, not a model; merge it with its base, the export that it was "
            f"trained on: `megaback convert {path} --base BASE --out DIR`, and give DIR"
        )


def checkpoints_meant_by(path: Path) -> list[Path]:
    """The complete checkpoints of a run, its folder of checkpoints or its copies, oldest first.

    For a checkpoint or a mark, only that one. Nothing is verified. Raises the errors of `meant_by`.
    """
    path = meant_by(path)
    if (path / META_NAME).is_file():
        return [path]
    return complete_checkpoints(path) or _complete_in(path)


def meant_by(path: Path) -> Path:
    """The checkpoint that `best` or `latest` names; any other path unchanged.

    Raises CheckpointCorruptError if the mark names none, and OSError.
    """
    if path.name not in (BEST_NAME, LATEST_NAME) or not path.is_file():
        return path
    try:
        name = read_file(path, _MAX_MARK_BYTES).decode().strip()
        return path_within(path.parent, name, STEP_FOLDER)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNFIT:
            raise
        raise CheckpointCorruptError(
            f"{path} does not name a checkpoint in its folder ({error}); give a step's folder"
        ) from None


def holds_weights(base: Path) -> bool:
    """Whether a run can start from a path: a model's folder, a run, or one of its checkpoints.

    Nothing is verified.
    """
    if base.is_file():  # a mark
        return base.name in (BEST_NAME, LATEST_NAME)
    return (base / MODEL_CONFIG_NAME).is_file() or bool(checkpoints_meant_by(base))
