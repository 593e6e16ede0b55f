"""Waits of the host for a GPU, as PyTorch reports them: each with the line that waits.

`torch.cuda.set_sync_debug_mode` warns at operations that wait for the current stream: copies to the
host, `item`, `nonzero`. It does not see `Event.synchronize` and `torch.cuda.synchronize`.
"""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MESSAGE = "called a synchronizing CUDA operation"
_ROOT = Path(__file__).parents[2]
_OURS = ("megaback", "data_pipeline", "benchmarks", "tests")


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Places of this process that wait within the block, one entry per wait; none on a CPU."""
    places: list[str] = []

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if _MESSAGE in str(message):
            places.append(_place())

    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            yield places
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def is_ours(place: str) -> bool:
    """Whether a place is in this project's code, rather than in a library's."""
    return place.split("/")[0] in _OURS


def _place() -> str:
    """`package/module.py:line` of the innermost frame that is not PyTorch's."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if "site-packages" in path.parts:
            parts = path.parts[path.parts.index("site-packages") + 1 :]
        elif path.is_relative_to(_ROOT):
            parts = path.relative_to(_ROOT).parts
        else:
            continue
        if parts[0] in ("deepspeed", *_OURS):
            return f"{'/'.join(parts)}:{frame.lineno}"
    return "?"
