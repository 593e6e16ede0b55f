"""The fake GPU finds what it is for: mixed devices, synchronizations and copies."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.fake_gpu_device import NAME


@on_fake_gpu
def test_results_are_those_of_the_cpu_and_stay_on_the_device() -> None:
    layer = nn.Linear(4, 3)
    inputs = torch.randn(5, 4, generator=torch.manual_seed(0))
    layer(inputs).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()

    on_gpu = moved(layer)
    checkpoint(on_gpu, inputs.to(gpu()), use_reentrant=False).square().sum().backward()

    for parameter, gradient in zip(on_gpu.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.device == gpu()
        assert torch.equal(parameter.grad.cpu(), gradient)


@on_fake_gpu
def test_tensors_of_both_devices_in_one_operation_are_an_error() -> None:
    on_gpu = torch.ones(3, device=gpu())

    with pytest.raises(
        RuntimeError, match=r"expected all tensors to be on the same device.*\(3,\)"
    ):
        on_gpu + torch.ones(3)
    assert (on_gpu + torch.tensor(2.0)).tolist() == [3.0] * 3  # a scalar is passed to the kernel


SYNCS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "a condition": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a written mask": lambda x: x.index_put_((x > 0,), torch.zeros((), device=x.device)),
    "a list as an index": lambda x: x[[0, 2]],
    "repeats": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=x.device)),
    "a tensor from the host": lambda x: torch.tensor([1, 2], device=x.device),
    "pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a written copy": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("work", SYNCS.values(), ids=SYNCS)
@on_fake_gpu
def test_a_synchronization_is_counted_with_its_line(work: Callable[[Tensor], object]) -> None:
    values = torch.arange(3.0, device=gpu())

    with counted() as traffic:
        work(values)

    (sync,) = traffic.syncs
    assert "tests/unit/test_fake_gpu.py:" in sync


FREE = {
    "a product": lambda x: x @ x,
    "a view": lambda x: x[1:].view(-1),
    "a scalar": lambda x: x.add_(2.0),
    "a filled slot": lambda x: x[1:].fill_(3),
    "repeats of a known size": lambda x: x.repeat_interleave(
        torch.ones(3, dtype=torch.long, device=x.device), output_size=3
    ),
    "pinned memory": lambda x: torch.ones(3).pin_memory()[:2].to(x.device, non_blocking=True),
    "memory made pinned": lambda x: x.copy_(torch.ones(3, pin_memory=True), non_blocking=True),
    "an async copy to the host": lambda x: x.to("cpu", non_blocking=True),
}


@pytest.mark.parametrize("work", FREE.values(), ids=FREE)
@on_fake_gpu
def test_work_without_a_synchronization_counts_none(work: Callable[[Tensor], object]) -> None:
    values = torch.arange(3.0, device=gpu())

    with counted() as traffic:
        work(values)

    assert traffic.syncs == []


@on_fake_gpu
def test_a_copy_in_each_direction_is_counted_once() -> None:
    with counted() as traffic:
        on_gpu = torch.from_numpy(np.arange(3)).to(gpu())
        (on_gpu * 2).to("cpu", non_blocking=True)

    assert len(traffic.to_device) == len(traffic.to_host) == 1
    assert "_to_copy in test_a_copy_in_each_direction_is_counted_once" in traffic.to_host[0]


@on_fake_gpu
def test_views_and_memory_are_no_kernels_and_attention_is_one() -> None:
    heads = torch.ones(1, 2, 3, 4, device=gpu())

    with counted() as traffic:
        torch.empty_like(heads).transpose(1, 2)[0].unbind()
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        heads.exp()

    assert traffic.kernels == {"scaled_dot_product_attention": 1, "exp": 1}
    assert "2 kernels" in str(traffic)


@on_fake_gpu
def test_a_tensor_on_another_stream_is_an_error_until_that_has_waited() -> None:
    values, other = torch.ones(3, device=gpu()), torch.Stream(gpu())
    with other, pytest.raises(RuntimeError, match="a stream that has not waited"):
        values.exp()
    written = torch.accelerator.current_stream(gpu()).record_event()

    other.wait_event(written)
    with other, pytest.raises(RuntimeError, match="without `record_stream`"):
        values.exp()
    values.record_stream(other)
    with other:
        made = values.exp()

    with pytest.raises(RuntimeError, match="a stream that has not waited"):
        made.tolist()


@on_fake_gpu
def test_an_event_is_waited_for_unless_the_host_has_waited_for_later_work() -> None:
    values = torch.ones(3, device=gpu())
    stream = torch.accelerator.current_stream(gpu())
    with counted() as waiting:
        stream.record_event().synchronize()
    copied = (values + 1).to("cpu", non_blocking=True)
    event = stream.record_event()
    values.tolist()

    with counted() as free:
        event.synchronize()
        assert copied.tolist() == [2.0] * 3

    assert len(waiting.syncs) == 1
    assert free.syncs == []


def test_the_device_exists_only_in_its_tests() -> None:
    on_fake_gpu(lambda: None)()

    with pytest.raises(RuntimeError, match=NAME):
        torch.zeros(1, device=NAME)


def test_a_failure_in_the_fork_is_one_of_the_test() -> None:
    @on_fake_gpu
    def fails() -> None:
        assert torch.ones(1, device=gpu()).tolist() == [2.0]

    with pytest.raises(AssertionError, match=r"\[1\.0\] == \[2\.0\]"):
        fails()
