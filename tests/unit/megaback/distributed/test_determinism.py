"""Deterministic algorithms, on a machine that is said to have a GPU."""

import os

import pytest
import torch

from data_pipeline.errors import BackendError
from megaback.distributed.determinism import use_deterministic_algorithms


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> object:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # restored after the test
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_on_a_gpu_pytorch_and_cublas_are_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    use_deterministic_algorithms("auto")

    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # kernels need the strict mode
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(("device", "has_gpu"), [("cpu", True), ("auto", False)])
def test_on_a_cpu_nothing_is_changed(
    device: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)

    use_deterministic_algorithms(device)

    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")

    with pytest.raises(BackendError, match=r"is :0:0, .* training\.deterministic=false"):
        use_deterministic_algorithms("cuda")
