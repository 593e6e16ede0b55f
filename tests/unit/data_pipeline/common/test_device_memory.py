"""PyTorch's errors for memory that a device or host does not have, and other errors."""

import subprocess
import sys

import click
import pytest
import torch
from click.testing import CliRunner

from data_pipeline.common.command import Command
from data_pipeline.common.device_memory import failed_allocation
from data_pipeline.errors import DeviceMemoryError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.81 GiB. GPU 0 has a"),
            "7.81 GiB could not be allocated",
        ),
        (torch.OutOfMemoryError("HIP out of memory."), "an allocation failed"),
        (RuntimeError("a defect: tried to allocate 3 MiB"), None),
        (MemoryError("cannot allocate"), None),
    ],
)
def test_only_pytorchs_errors_of_allocation_are_recognized(
    error: Exception, expected: str | None
) -> None:
    assert failed_allocation(error) == expected


def test_an_allocation_that_the_host_refuses_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)

    assert failed_allocation(caught.value) == f"{1 << 60} bytes could not be allocated"


def test_without_torch_no_error_is_recognized() -> None:
    code = (
        "import sys; from data_pipeline.common.device_memory import failed_allocation as failed; "
        "assert failed(RuntimeError()) is None and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_command_out_of_memory_has_a_message_and_an_exit_code() -> None:
    @click.command(cls=Command)
    def use() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    result = CliRunner().invoke(use, [])

    assert result.exit_code == DeviceMemoryError.exit_code
    assert "out of memory (2.00 GiB could not be allocated)" in result.stderr
    assert "Traceback" not in result.stderr
