"""The names of a checkpoint's files and folders, and what the marks `best` and `latest` name.

Loads no torch.
"""

import re
from pathlib import Path

from data_pipeline.common.file_names import path_within
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import CheckpointCorruptError
from data_pipeline.shards.manifest import TOKENIZER_NAME

CHECKPOINTS_FOLDER = "checkpoints"
META_NAME = "meta.json"
LATEST_NAME = "latest"
BEST_NAME = "best"
"""Beside the checkpoints: the name of the one with the lowest val loss, which is never let go."""
WEIGHTS_PREFIX = "weights-"
OPTIMIZER_PREFIX = "optimizer-"
STEP_FOLDER = re.compile(r"step-[0-9]{8}")
FILE_NAME = re.compile(
    rf"({WEIGHTS_PREFIX}|{OPTIMIZER_PREFIX})[0-9]{{5,}}\.safetensors|{re.escape(TOKENIZER_NAME)}"
)
"""What a checkpoint's description may name."""
CHECKPOINT_FILE = re.compile(rf"{FILE_NAME.pattern}|{re.escape(META_NAME)}")
"""The names of the files in a checkpoint: others in its folder are not removed with it."""
_MAX_MARK_BYTES = 256


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(
        path.parent
        for path in (run / CHECKPOINTS_FOLDER).glob(f"step-*/{META_NAME}")
        if STEP_FOLDER.fullmatch(path.parent.name)
    )


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by the name of its folder."""
    return int(checkpoint.name.removeprefix("step-"))


def meant_by(path: Path) -> Path:
    """The checkpoint that `best` or `latest` names; any other path as it is.

    Raises CheckpointCorruptError for what names none, OSError.
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
            f"{path} does not name a checkpoint beside it ({error}); name one yourself"
        ) from None
