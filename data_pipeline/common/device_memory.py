"""PyTorch's errors for allocations that a device has no memory for. Loads no torch."""

import re
import sys

from data_pipeline.errors import DeviceMemoryError

_SIZE = re.compile(r"tried to allocate ([0-9.]+ (?:[KMGTP]iB|bytes))", re.IGNORECASE)
_HOST_ALLOCATOR = "DefaultCPUAllocator"


def failed_allocation(error: BaseException) -> str | None:
    """Description of the allocation, if the error is that a device or host has no memory for it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return None
    if not isinstance(error, torch.OutOfMemoryError) and _HOST_ALLOCATOR not in str(error):
        return None
    found = _SIZE.search(str(error))
    return f"{found[1]} could not be allocated" if found else "an allocation failed"


def memory_error_of_use(error: BaseException) -> DeviceMemoryError | None:
    """The error of a command that uses a model, or None for any other error."""
    failed = failed_allocation(error)
    if failed is None:
        return None
    return DeviceMemoryError(
        f"the device is out of memory ({failed}); process fewer or shorter texts at a time, choose "
        "another device, or use bfloat16"
    )
