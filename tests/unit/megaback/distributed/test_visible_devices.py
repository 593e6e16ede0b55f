"""GPUs are counted by the driver's files and the variables that select some of them."""

import importlib.machinery
from pathlib import Path

import pytest

from megaback.distributed import visible_devices
from megaback.distributed.visible_devices import count_device_files, count_devices

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(visible_devices, "_is_rocm", lambda: False)


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visible_devices, "_is_rocm", lambda: True)


def make_files(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def make_amd_node(root: Path, number: int, minor: int) -> None:
    folder = root / f"sys/class/kfd/kfd/topology/nodes/{number}"
    folder.mkdir(parents=True)
    (folder / "properties").write_text(f"simd_count 8\ndrm_render_minor {minor}\nnum_xcc 1\n")


def test_nvidias_gpus_are_counted_by_their_device_files(tmp_path: Path) -> None:
    make_files(tmp_path, "dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm")
    make_amd_node(tmp_path, 1, 128)

    assert count_device_files(tmp_path) == 2


@pytest.mark.usefixtures("rocm")
def test_with_rocm_the_gpus_that_the_container_may_open_are_counted(tmp_path: Path) -> None:
    make_files(tmp_path, "dev/nvidia0", "dev/dri/renderD128", "dev/dri/renderD129", "dev/dri/card0")
    make_amd_node(tmp_path, 0, 0)  # the processor
    for number in (1, 2, 3):
        make_amd_node(tmp_path, number, 127 + number)

    assert count_device_files(tmp_path) == 2


def test_without_a_drivers_files_there_is_no_gpu(tmp_path: Path) -> None:
    assert count_device_files(tmp_path) == 0


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ("", 0),
        ("3", 1),
        ("0, 2,5", 3),
        ("GPU-8932f937-d72c-4106,GPU-1d2c", 2),
        ("MIG-7eba3e6c-2bd1-5c1a", 1),
        ("-1", 0),
        ("0,-1,1", 1),  # CUDA ignores the rest
        ("0,,1", 1),
    ],
)
def test_cuda_visible_devices_selects_gpus(
    monkeypatch: pytest.MonkeyPatch, value: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")  # Slurm sets it on all machines

    assert count_devices() == count


@pytest.mark.usefixtures("rocm")
def test_with_rocm_every_variable_can_select_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1,2,3")
    assert count_devices() == 4
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    assert count_devices() == 2


@pytest.mark.parametrize(
    ("line", "expected"),
    [("hip: Optional[str] = None", False), ("hip: Optional[str] = '6.4.43484'", True)],
)
def test_the_kind_of_gpu_is_that_of_the_installed_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: bool
) -> None:
    monkeypatch.undo()
    make_files(tmp_path, "torch/__init__.py")
    (tmp_path / "torch/version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    monkeypatch.setattr(
        visible_devices,
        "find_spec",
        lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )

    assert visible_devices._is_rocm() is expected
