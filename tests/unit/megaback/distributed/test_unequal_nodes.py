"""Choice of a rank's device, on nodes that show all GPUs, one, or none that torch can use."""

from types import SimpleNamespace

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
        distributed.choose_device("auto", 0)
    with pytest.raises(SystemExit) as ending:
        distributed.choose_device("auto", 1)
    assert ending.value.code == LaunchError.exit_code


@pytest.mark.usefixtures("broken_node")
def test_the_cpu_is_used_when_requested_or_when_gpus_are_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert distributed.choose_device("cpu", 1).type == "cpu"
    with pytest.raises(BackendError):
        distributed.choose_device("cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert distributed.choose_device("auto", 0).type == "cpu"


def test_cuda_visible_devices_alone_does_not_imply_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deepspeed command sets CUDA_VISIBLE_DEVICES on machines without a GPU too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "count_device_files", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")

    assert distributed.choose_device("auto", 0).type == "cpu"


@pytest.mark.parametrize(
    ("local_rank", "visible", "is_srun", "index"),
    [(3, 8, False, 3), (3, 1, True, 0), (0, 1, False, 0), (3, 1, False, None), (3, 2, True, None)],
)
def test_a_task_that_sees_one_gpu_uses_it(
    monkeypatch: pytest.MonkeyPatch,
    local_rank: int,
    visible: int,
    is_srun: bool,
    index: int | None,
) -> None:
    """As with `srun --gpus-per-task`, where cgroups hide the other tasks' GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    if is_srun:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")

    if index is None:
        with pytest.raises(LaunchError, match="local rank 3 has no device"):
            distributed.choose_device("auto", local_rank)
    else:
        assert distributed.choose_device("auto", local_rank) == torch.device("cuda", index)


@pytest.mark.parametrize("names", ["GPU-8932f937,GPU-1d2c", "MIG-7eba3e6c", "0,1"])
def test_deepspeed_accepts_the_names_of_devices(
    monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    from deepspeed.accelerator import cuda_accelerator

    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda _handle: SimpleNamespace(free=7),
    )
    monkeypatch.setattr(cuda_accelerator, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    accelerator = cuda_accelerator.CUDA_Accelerator()
    monkeypatch.setattr(accelerator, "total_memory", lambda _index: 10)
    monkeypatch.setattr(accelerator, "memory_allocated", lambda _index: 4)

    distributed._allow_device_names()

    assert accelerator.available_memory(0) == (7 if names == "0,1" else 6)


def test_a_node_has_its_name_in_slurm_or_in_the_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    monkeypatch.delenv("MEGABACK_HOST", raising=False)
    assert node_name() == "n3"
    monkeypatch.setenv("MEGABACK_HOST", "me@node")
    assert node_name() == "me@node"
