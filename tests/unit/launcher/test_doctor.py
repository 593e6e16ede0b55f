"""`megaback doctor` on many kinds of machines, and on this one."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor
from launcher.doctor import NOT_READY, Line, explain, is_ready
from launcher.machine import Machine

CPU_TORCH = {
    "torch": "2.13.0+cpu",
    "cuda_build": None,
    "devices": [],
    "gloo": True,
    "nccl": False,
    "deepspeed": "0.19.8",
    "attention": {
        "auto": "sdpa",
        "kernels": dict.fromkeys(("flash_attn_4", "varlen", "flash_attn"), "the device is cpu"),
        "install": "pip install 'torch>=2.11'",
    },
    "problems": {},
}
GPU = {"name": "H100", "memory_bytes": 80 * 10**9, "compute_capability": "9.0"}
CUDA_TORCH = CPU_TORCH | {
    "torch": "2.13.0+cu130",
    "cuda_build": "13.0",
    "devices": [GPU] * 8,
    "nccl": True,
    "attention": {
        "auto": "varlen",
        "kernels": {"flash_attn_4": "it cannot be imported", "varlen": None, "flash_attn": None},
        "install": "pip install 'torch>=2.11'",
    },
}
LAPTOP = Machine(
    host="laptop",
    megaback="0.1.0 of /opt/megaback",
    hidden=(),
    sharing=(),
    python="3.11.7",
    cores=8,
    threads=None,
    memory_bytes=16 * 10**9,
    folder="runs",
    disk_free_bytes=200 * 10**9,
    is_writable=True,
    shm_free_bytes=8 * 10**9,
    open_files=4096,
    max_open_files=4096,
    locked_bytes=-1,
    num_gpus=0,
    driver=None,
    unmet=(),
    unread=(),
    programs=("cc", "ssh"),
    partitions=(),
    torch=CPU_TORCH,
)
NODE = replace(
    LAPTOP,
    num_gpus=8,
    driver="580.1",
    programs=("cc", "ssh", "sbatch", "srun"),
    partitions=("gpu*, 4 nodes, gpu:8, infinite",),
    torch=CUDA_TORCH,
)


def line(machine: Machine, name: str) -> Line:
    (found,) = [line for line in explain(machine) if line.name == name]
    return found


def test_a_laptop_is_ready_and_its_limitations_are_listed() -> None:
    states = {line.name: line.state for line in explain(LAPTOP)}

    assert is_ready(explain(LAPTOP))
    assert [name for name, state in states.items() if state == "no"] == [
        "train on GPUs",
        "train on a Slurm cluster",
    ]
    assert all(line.fix for line in explain(LAPTOP) if line.state == "no")


def test_everything_works_on_a_cluster_node() -> None:
    assert {line.state for line in explain(NODE)} == {"yes"}
    assert line(NODE, "GPUs").text == "8 x H100, 80 GB"
    assert line(NODE, "Slurm").text == "gpu*, 4 nodes, gpu:8, infinite"


@pytest.mark.parametrize(
    ("machine", "name", "text", "fix"),
    [
        (replace(LAPTOP, python="3.9.2"), "Python", "3.9.2", "make PYTHON="),
        (replace(LAPTOP, unmet=("click is missing",)), "packages", "click is", "pip install -c"),
        (
            replace(LAPTOP, torch={"problems": {"torch": "OSError: libcudart"}}),
            "torch",
            "OSError: libcudart",
            "pip install",
        ),
        (
            replace(LAPTOP, torch=CPU_TORCH | {"deepspeed": None, "problems": {"deepspeed": "x"}}),
            "DeepSpeed",
            "x",
            "pip install",
        ),
        (replace(NODE, torch=CPU_TORCH), "GPUs", "torch sees none", "a CUDA build of torch"),
        (replace(NODE, torch=CUDA_TORCH | {"devices": []}), "GPUs", "sees none", "nvidia-smi"),
        (replace(LAPTOP, is_writable=False), "disk", "not writable", "run=/path"),
        (replace(LAPTOP, torch=CPU_TORCH | {"gloo": False}), "communication", "neither", "torch"),
    ],
)
def test_missing_requirements_are_named_with_a_fix(
    machine: Machine, name: str, text: str, fix: str
) -> None:
    found = line(machine, name)

    assert found.state == "no"
    assert text in found.text
    assert fix in found.fix
    assert not is_ready(explain(machine))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"disk_free_bytes": 10**9}, "disk"),
        ({"shm_free_bytes": 64 * 10**6}, "shared memory"),
        ({"open_files": 256}, "open files"),
        ({"threads": "64"}, "cores"),
        ({"programs": ("ssh",)}, "C compiler"),
        ({"hidden": ("torch",)}, "megaback"),
        ({"sharing": ("other",)}, "megaback"),
    ],
)
def test_notes_do_not_make_a_machine_unready(fields: dict[str, Any], name: str) -> None:
    machine = replace(LAPTOP, **fields)

    assert line(machine, name).state == "note"
    assert line(machine, name).fix
    assert is_ready(explain(machine))


def test_an_unreachable_slurm_does_not_make_a_machine_unready() -> None:
    machine = replace(NODE, slurm_problem="sinfo: fatal: no source")

    assert line(machine, "Slurm").text == "sinfo: fatal: no source"
    assert line(machine, "train on a Slurm cluster").state == "no"
    assert is_ready(explain(machine))


def test_missing_packages_of_sources_are_a_note() -> None:
    machine = replace(LAPTOP, unread=("datasets", "pyarrow"))
    found = line(machine, "packages")

    assert (found.state, found.fix) == ("note", "pip install datasets pyarrow")
    assert "pyarrow is missing: no parquet files" in found.text
    assert is_ready(explain(machine))


def test_a_terminal_gets_a_table_with_unwrapped_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    machine = replace(LAPTOP, unmet=("click is missing",))
    doctor._print_table(explain(machine))

    assert "pip install -c constraints.txt -e ." in capsys.readouterr().out


def test_the_attention_that_auto_chooses_is_named() -> None:
    assert line(LAPTOP, "attention").text == "auto is sdpa, the one for CPUs"
    assert line(NODE, "attention").text == "auto is varlen; flash_attn, sdpa also work"


def test_slow_attention_on_a_gpu_is_a_note_with_the_reasons_and_a_fix() -> None:
    kernels = {"varlen": "torch.nn.attention.varlen has no varlen_attn", "flash_attn": "missing"}
    attention = {"auto": "sdpa", "kernels": kernels, "install": "pip install 'torch>=2.11'"}
    found = line(replace(NODE, torch=CUDA_TORCH | {"attention": attention}), "attention")

    assert (found.state, found.fix) == ("note", "pip install 'torch>=2.11'")
    assert "which is slow (varlen: torch.nn.attention.varlen has no varlen_attn;" in found.text


def test_attention_that_cannot_be_examined_is_reported() -> None:
    torch = {key: value for key, value in CUDA_TORCH.items() if key != "attention"}
    machine = replace(NODE, torch=torch | {"problems": {"attention": "RuntimeError: driver"}})

    assert line(machine, "attention").state == "no"
    assert line(machine, "attention").text == "RuntimeError: driver"


def test_this_machine_is_ready(
    run_megaback: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    result = run_megaback("doctor", "--json", tmp_path)
    report = json.loads(result.stdout)

    assert (result.returncode, report["ready"]) == (0, True), result.stdout
    assert report["machine"]["torch"]["deepspeed"]
    assert report["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_without_an_importable_torch_a_machine_is_not_ready(
    run_megaback: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run_megaback("doctor", env=environment)

    assert result.returncode == NOT_READY
    assert "no   torch: ImportError: libcudart.so.13: cannot open -> pip install" in result.stdout
    assert result.stderr == ""


def test_a_torch_that_crashes_does_not_crash_the_doctor(
    run_megaback: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = run_megaback("doctor", env=environment)

    assert result.returncode == NOT_READY
    assert "no   torch: its import exited with code -6" in result.stdout
