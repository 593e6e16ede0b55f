"""Files of DeepSpeed's own checkpoints, unpickled without running code of theirs.

Besides tensors and Python's own types they contain a few classes of DeepSpeed, in place of which
there are inert ones. A file that needs any other class is refused. Tensors are mapped from the
files, and read when they are used.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.file_names import path_within
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError

_LATEST = "latest"
_MAX_NAME_BYTES = 1 << 10
_TAG = re.compile(r"[\w.-]+")
_UNIVERSAL = "zero"
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_CLASSES = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes in checkpoints of ZeRO stages 0 to 3, in fp32, bf16 and fp16."""


class Inert:
    """Placeholder of an object of DeepSpeed: the arguments that it was made from."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed, or the folder of several."""
    try:
        return bool(model_files(_tagged(path)))
    except (CheckpointCorruptError, OSError):
        return False


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint of a path: itself, or the one that `latest` in it names.

    Raises CheckpointMissingError, CheckpointCorruptError.
    """
    folder = _tagged(path)
    if not model_files(folder):
        raise CheckpointMissingError(
            f"{folder} is not a checkpoint of DeepSpeed (it has no *_model_states.pt); give a "
            "folder such as global_step1000, or the one that contains it and the file latest"
        )
    return folder


def _tagged(path: Path) -> Path:
    latest = path / _LATEST
    if model_files(path) or not latest.is_file():
        return path
    try:
        tag = read_file(latest, _MAX_NAME_BYTES).decode().strip()
        return path_within(path, tag, _TAG)
    except (OSError, ValueError) as error:
        raise CheckpointCorruptError(
            f"{latest} does not name a checkpoint ({error}); give the folder of one"
        ) from None


def model_files(folder: Path) -> list[Path]:
    """Files of the model's state, by rank. Raises CheckpointCorruptError."""
    return _files(folder, _MODEL_FILE)


def optimizer_files(folder: Path) -> list[Path]:
    """Files of the optimizer's state, by rank. Raises CheckpointCorruptError."""
    return _files(folder, _OPTIMIZER_FILE)


def _files(folder: Path, form: re.Pattern[str]) -> list[Path]:
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := form.fullmatch(path.name)) is None:
            continue
        if int(match[2]):
            raise CheckpointCorruptError(
                f"{path} is of a model that several ranks share by tensor parallelism; merge them "
                "with DeepSpeed's ds_to_universal.py first"
            )
        found[int(match[1] or 0)] = path
    if sorted(found) != list(range(len(found))):
        missing = min(set(range(max(found))) - found.keys())
        raise CheckpointCorruptError(
            f"the checkpoint {folder} is incomplete: the file of rank {missing} is missing beside "
            f"{found[max(found)].name}; copy the files of all ranks"
        )
    return [found[rank] for rank in sorted(found)]


def universal_folder(folder: Path) -> Path | None:
    """Folder of a universal checkpoint's parameters; None for another kind of checkpoint."""
    path = folder / _UNIVERSAL
    return path if path.is_dir() else None


def load(path: Path) -> Any:
    """Content of a file. Raises CheckpointCorruptError."""
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in _CLASSES]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"contains {found[1]}" if found else "cannot be unpickled safely"
        raise CheckpointCorruptError(
            f"{path} {what}, and only tensors and the classes of DeepSpeed's checkpoints are "
            "loaded, since others could run code; save the weights as safetensors "
            "(save_pretrained), and import these"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"{path} is not a whole file of torch.save ({reason:.200}); copy it again"
        ) from None
