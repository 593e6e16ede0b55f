"""Nodes whose GPUs torch does not see: an error instead of training on the CPU."""

import pytest
import torch

from data_pipeline.errors import BackendError, LaunchError
from megaback.distributed import world as distributed
from megaback.distributed.rendezvous import node_name


@pytest.fixture
def broken_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node where the driver has two GPUs, and torch none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("megaback.distributed.visible_devices.count_device_files", lambda: 2)
    monkeypatch.setattr(distributed, "count_device_files", lambda: 2)


@pytest.mark.usefixtures("broken_node")
def test_a_node_whose_gpus_torch_does_not_see_is_reported_by_one_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEGABACK_HOST", "n7")

    with pytest.raises(LaunchError, match="node n7 has GPUs, but torch sees none"):
        distributed._choose_device("auto", 0)
    with pytest.raises(SystemExit) as ending:
        distributed._choose_device("auto", 1)
    assert ending.value.code == LaunchError.exit_code


@pytest.mark.usefixtures("broken_node")
def test_the_cpu_is_used_when_requested_or_when_gpus_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert distributed._choose_device("cpu", 1).type == "cpu"
    with pytest.raises(BackendError):
        distributed._choose_device("cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed._choose_device("auto", 0).type == "cpu"


def test_cuda_visible_devices_alone_does_not_imply_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed command sets CUDA_VISIBLE_DEVICES on machines without a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "count_device_files", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    assert distributed._choose_device("auto", 0).type == "cpu"


def test_a_node_has_its_name_in_slurm_or_in_the_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    monkeypatch.delenv("MEGABACK_HOST", raising=False)
    assert node_name() == "n3"
    monkeypatch.setenv("MEGABACK_HOST", "me@node")
    assert node_name() == "me@node"
