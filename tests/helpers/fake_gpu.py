"""A device that behaves as a GPU and computes on the CPU, for tests without one.

Its tensors hold CPU tensors, so results are real. An operation on tensors of both devices is an
error, as on CUDA, and so is the use of a tensor on a stream that has not waited for it. Kernels,
copies between the devices and synchronizations of the host are counted. Memory and time are not
simulated.

The device is a process-wide setting of torch, so each test runs in a fork of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.device_traffic import Traffic
from tests.helpers.fake_gpu_device import NAME, FakeGpuTensor, current_device, new_device
from tests.helpers.fake_graphs import FakeCapture
from tests.helpers.in_fork import in_fork

_FUSED = {F.scaled_dot_product_attention, F.rms_norm}


class _FusedKernels(TorchFunctionMode):
    """Functions that are one kernel in the forward pass on a GPU, and several here."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function not in _FUSED or not isinstance(args[0], FakeGpuTensor):
            return function(*args, **(kwargs or {}))
        with current_device().one_kernel(function.__name__):
            return function(*args, **(kwargs or {}))


class _Module:
    """The functions that torch calls of a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, _seed: int) -> None:
        """Has no effect: no random numbers are made on the device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, _device: object = None) -> Tensor:
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, _state: Tensor, _device: object = None) -> None:
        """Has no effect: no random numbers are made on the device."""

    @contextmanager
    def device(self, _device: object) -> Iterator[None]:
        yield


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the work that the device gets."""
    traffic = Traffic()
    counting = current_device().counting
    counting.append(traffic)
    try:
        yield traffic
    finally:
        counting.remove(traffic)


def fake_capture() -> FakeCapture:
    """A stand-in for CUDA's graphs, in a test of the fake GPU."""
    return FakeCapture(current_device().record)


def pinned(tensor: Tensor) -> Tensor:
    """The same host memory, page-locked for the fake GPU."""
    return current_device().in_pinned_memory(tensor)


def gpu() -> torch.device:
    """The fake device, in a test of it."""
    current_device()
    return torch.device(NAME, 0)


Moved = TypeVar("Moved", bound=nn.Module)


def moved(model: Moved) -> Moved:
    """A model, moved to the fake device; tied weights stay tied."""
    names = {id(one): name for name, one in model.named_parameters()}
    tied = {
        name: names[id(one)]
        for name, one in model.named_parameters(remove_duplicate=False)
        if names[id(one)] != name
    }
    model.to(gpu())
    for name, first in tied.items():
        folder, _, last = name.rpartition(".")
        setattr(model.get_submodule(folder), last, model.get_parameter(first))
    return model


Parameters = ParamSpec("Parameters")


def on_fake_gpu(test: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A test that has a fake GPU, as `gpu()`."""

    @wraps(test)
    def isolated(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        import torch._dynamo  # noqa: F401 - once here, not in each fork

        def with_device() -> None:
            with _entered():
                test(*args, **kwargs)

        in_fork(with_device)

    return isolated


@contextmanager
def _entered() -> Iterator[None]:
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` on the device is a copy then
    # Errors in a backward pass on another thread would abort the process.
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    device = new_device()
    torch.Stream = device.streams.new_stream  # type: ignore[assignment,misc]
    torch.accelerator.current_stream = device.streams.current_stream  # type: ignore[assignment]
    with device, _FusedKernels():
        yield
