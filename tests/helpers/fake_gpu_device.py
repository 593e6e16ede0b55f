"""Tensors of the fake GPU, and its operations: computed on the CPU, checked and counted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers.device_traffic import Traffic, at_line
from tests.helpers.fake_graphs import Recording
from tests.helpers.fake_streams import FakeDeviceStreams

NAME = "fakegpu"
_aten = torch.ops.aten
_CPU = torch.device("cpu")
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_SYNCS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
}
_ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "resize_",
    "set_",
}
_VIEWS = {"detach_", "_unsafe_view", "_reshape_alias", "lift", "lift_fresh"}


class FakeGpuTensor(Tensor):
    """A tensor on the fake device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "FakeGpuTensor":
        with torch.inference_mode(held.is_inference()):  # a view of a usual tensor is a usual one
            made: FakeGpuTensor = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=torch.device(NAME, 0),
            )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{operation} on the fake GPU outside of a test of it")

    def tolist(self) -> Any:
        device = current_device()
        device.streams.read(_memory(self))
        device.sync("tolist")
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        current_device().streams.keep(_memory(self), stream)

    def numpy(self, **_: object) -> Any:
        raise TypeError("can't convert a tensor on the fake GPU to numpy; copy it to the host")

    def __repr__(self, **_: Any) -> str:
        return f"fake GPU {self.held!r}"


class FakeDevice(TorchDispatchMode):
    """The device, while it is entered: computes and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.counting: list[Traffic] = []
        self.streams = FakeDeviceStreams(self._count_sync)
        self._pinned: dict[int, Tensor] = {}  # held, as the address of freed memory is reused
        self._within = 0
        self._recording: Recording | None = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work as a graph: see `fake_graphs`. Returns its replay."""
        recording = self._recording = Recording()
        try:
            work()
        finally:
            self._recording = None
            recording.end()

        def replay() -> None:
            self._kernel("graph")
            for memory in recording.repeat():
                self.streams.write(memory, is_new=False)

        return replay

    def sync(self, what: str) -> None:
        """Wait for the current stream."""
        if self._recording is not None:
            raise RuntimeError(f"{at_line(what)} is not permitted while a graph is captured")
        self.streams.host_waits(self.streams.current.record_event(), what)

    def _count_sync(self, what: str) -> None:
        for traffic in self.counting:
            traffic.syncs.append(at_line(what))

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        """Count everything within as one kernel."""
        self._kernel(name)
        self._within += 1
        try:
            yield
        finally:
            self._within -= 1

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if operation is _aten.is_pinned.default:
            return self.is_pinned(args[0])
        if operation in (_aten._pin_memory.default, _aten.pin_memory.default):
            return self.in_pinned_memory(args[0].clone())
        pins = kwargs.pop("pin_memory", None)
        result = self._call(operation, args, kwargs)
        return self.in_pinned_memory(result) if pins else result

    def _call(self, operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors: list[Tensor] = []
        if self._recording is not None:  # numbers on the host are passed with the kernel
            args = tree_map(_copied_if_on_host, args)
        held_args = [_held(value, tensors) for value in args]
        held_kwargs = {name: _held(value, tensors) for name, value in kwargs.items()}
        on_gpu = [one for one in tensors if isinstance(one, FakeGpuTensor)]
        goes_to_gpu = bool(on_gpu)
        if kwargs.get("device") is not None:
            goes_to_gpu = torch.device(kwargs["device"]).type == NAME
            held_kwargs["device"] = _CPU
        if on_gpu or goes_to_gpu:
            if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), _COMPOSITE):
                with self:  # in inference mode torch does not take it apart by itself
                    return operation.decompose(*args, **kwargs)
            self._count(operation, args, kwargs, goes_to_gpu)
            if on_gpu and operation not in _COPIES | _INDEXING:
                _require_one_device(operation, tensors)
            if not operation.is_view:
                for tensor in on_gpu:
                    self.streams.read(_memory(tensor))
        if self._recording is not None and (on_gpu or goes_to_gpu):
            held = [one.held for one in tree_leaves(_written(operation, args, kwargs))]
            result = self._recording.run(operation, held_args, held_kwargs, held)
        else:
            result = operation(*held_args, **held_kwargs)
        if operation._schema.is_mutable:
            written = _written(operation, args, kwargs)
            for tensor in tree_leaves(written):
                self._mark(tensor, is_new=False)
            returns = len(operation._schema.returns)
            return (None, written[0] if written else None, tuple(written))[min(returns, 2)]
        if not goes_to_gpu or operation is _aten._local_scalar_dense.default:
            return result
        result = tree_map(
            lambda one: FakeGpuTensor(one) if isinstance(one, Tensor) else one, result
        )
        if not operation.is_view:
            for tensor in tree_leaves(result):
                self._mark(tensor, is_new=True)
        return result

    def _mark(self, tensor: Any, *, is_new: bool) -> None:
        if isinstance(tensor, FakeGpuTensor):
            self.streams.write(_memory(tensor), is_new=is_new)

    def _count(self, operation: Any, args: Any, kwargs: dict[str, Any], goes_to_gpu: bool) -> None:
        name = operation._schema.name.removeprefix("aten::")
        if operation in _COPIES:
            is_in_place = operation is _aten.copy_.default
            source = args[1] if is_in_place else args[0]
            to_gpu = isinstance(args[0], FakeGpuTensor) if is_in_place else goes_to_gpu
            if isinstance(source, FakeGpuTensor) != to_gpu:
                if self._recording is not None:
                    self.sync(f"{name} between the devices")
                is_async = kwargs.get("non_blocking", False) or (is_in_place and True in args[2:])
                host = source if to_gpu else (args[0] if is_in_place else None)
                # Without a destination, torch makes one in pinned memory.
                if host is not None and not self.is_pinned(host):
                    is_async = False
                self._copy(name, to_gpu=to_gpu, is_async=is_async)
                return
        if operation in _INDEXING:
            for index in args[1]:
                if (
                    isinstance(index, Tensor)
                    and not isinstance(index, FakeGpuTensor)
                    and index.ndim
                ):
                    self._copy(f"{name} with an index on the host", to_gpu=True, is_async=False)
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.sync(f"{name} with a mask")
        if operation in _SYNCS or (
            operation is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        ):
            self.sync(name)
        if not (operation.is_view or name in _ALLOCATIONS | _VIEWS):
            self._kernel(name)

    def _copy(self, name: str, *, to_gpu: bool, is_async: bool) -> None:
        for traffic in self.counting:
            (traffic.to_device if to_gpu else traffic.to_host).append(at_line(name))
        if not is_async:
            self.sync(name)

    def _kernel(self, name: str) -> None:
        if not self._within and self._recording is None:
            for traffic in self.counting:
                traffic.kernels[name] += 1

    def in_pinned_memory(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


def _held(value: Any, tensors: list[Tensor]) -> Any:
    """An argument with tensors on the CPU only; its tensors are added to the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.held if isinstance(value, FakeGpuTensor) else value
    if isinstance(value, list | tuple):
        return type(value)(_held(one, tensors) for one in value)
    return value


def _require_one_device(operation: Any, tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError for a tensor on the host; scalars are passed with the kernel."""
    for tensor in tensors:
        if not isinstance(tensor, FakeGpuTensor) and tensor.ndim:
            raise RuntimeError(
                f"{operation}: expected all tensors to be on the same device, but a tensor of "
                f"shape {tuple(tensor.shape)} is on the host"
            )


def _copied_if_on_host(value: Any) -> Any:
    is_on_host = isinstance(value, Tensor) and not isinstance(value, FakeGpuTensor)
    return value.clone() if is_on_host else value


def _memory(tensor: FakeGpuTensor) -> int:
    return tensor.held.untyped_storage().data_ptr()


def _written(operation: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that were written, in place of the results that alias them."""
    schema = operation._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    given |= kwargs
    return [
        given[argument.name]
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


_device: FakeDevice | None = None


def current_device() -> FakeDevice:
    """The device of the test that is running."""
    assert _device is not None, "there is no fake GPU: use `on_fake_gpu`"
    return _device


def new_device() -> FakeDevice:
    """A device, which is the current one from now on."""
    global _device
    _device = FakeDevice()
    return _device
