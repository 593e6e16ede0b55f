"""Host copies of a state are exact in size and content, and cost one wait."""

import pytest
import torch
from torch import Tensor

from megaback.checkpoints import host_copy
from megaback.checkpoints.host_copy import HostCopy, page_locked
from tests.helpers.fake_gpu import counted, gpu, on_fake_gpu, pinned


def state_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(129, 3, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(seed),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "c": torch.randn(1025, generator=generator).double(),
    }


def test_the_block_is_as_large_as_its_tensors_and_holds_the_last_copy() -> None:
    copy = HostCopy(state_of(0))
    for seed in (0, 1):
        copy.fill(state_of(seed))

        assert list(copy) == list(state_of(seed))
        for name, expected in state_of(seed).items():
            assert copy[name].dtype == expected.dtype
            assert torch.equal(copy[name], expected)
    exact = sum(tensor.nbytes for tensor in state_of(0).values())
    assert 0 <= copy["a"].untyped_storage().nbytes() - exact < 16 * len(copy)


@on_fake_gpu
def test_a_state_on_a_gpu_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[Tensor] = []
    monkeypatch.setattr(
        host_copy, "page_locked", lambda block: bool(locked.append(pinned(block)) or True)
    )
    state = {name: tensor.to(gpu()) for name, tensor in state_of(2).items()}
    copy = HostCopy(state)

    with counted() as traffic:
        copy.fill(state)

    assert len(locked) == 1
    assert len(traffic.to_host) == len(state), traffic
    assert len(traffic.syncs) == 1, traffic
    assert all(torch.equal(copy[name], one) for name, one in state_of(2).items())


def test_memory_that_cannot_be_locked_is_used_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:  # noqa: N802 - CUDA's own name
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)

    assert not page_locked(torch.zeros(8, dtype=torch.uint8))
    assert "could not be page-locked (CUDA error 2)" in caplog.text
