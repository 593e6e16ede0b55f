"""The device that a model is loaded on, and the data type of its weights there."""

import torch

from data_pipeline.errors import BackendError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str | None) -> torch.device:
    """A device by name, or the first GPU, or the CPU. Raises BackendError if not available."""
    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError:
        raise BackendError(f"`device` {name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type != "cpu" and not (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    ):
        raise BackendError(
            f"`device` {name!r} is not available: torch sees {torch.cuda.device_count()} CUDA "
            "devices; use cpu, or a CUDA build of torch on a machine with GPUs"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """A data type by name; `auto` is bfloat16 on a GPU that computes in it, and float32 elsewhere.

    Raises BackendError for another name.
    """
    if name != "auto" and name not in DTYPES:
        raise BackendError(f"`dtype` is {name!r}; use {', '.join(['auto', *DTYPES])}")
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):  # the question is about the current device
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` or `bfloat16`."""
    return str(dtype).removeprefix("torch.")
