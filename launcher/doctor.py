"""`megaback doctor`: check of this machine's setup, with suggested fixes."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.packages import SOURCE_PACKAGES
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo, print_table
from launcher.machine import Machine, examine

State = Literal["yes", "note", "no"]
NOT_READY = 3
"""Exit code of a machine on which the main job does not work."""

_INSTALL = "pip install -c constraints.txt -e ."
_ENOUGH_DISK_BYTES = 20 * 10**9
_ENOUGH_SHM_BYTES = 10**9
_ENOUGH_FILES = 1024


@dataclass(frozen=True)
class Line:
    """Result of one check."""

    name: str
    state: State
    """yes: works; note: may matter; no: does not work."""
    text: str
    fix: str = ""
    """Command or change that fixes it, if any."""
    is_needed: bool = False
    """Whether the main job (shards, training, using the model) needs it."""


def explain(machine: Machine) -> list[Line]:
    """Checks of the parts of a machine, then of what can be done with it."""
    return [*_parts(machine), *_abilities(machine)]


def is_ready(lines: Sequence[Line]) -> bool:
    """Whether the main job works here."""
    return all(line.state != "no" for line in lines if line.is_needed)


def _parts(machine: Machine) -> Iterator[Line]:
    torch, problems = machine.torch, machine.torch.get("problems", {})
    too_old = tuple(map(int, machine.python.split(".")[:2])) < (3, 10)
    yield Line(
        "Python",
        "no" if too_old else "yes",
        machine.python,
        "make PYTHON=python3.11 .venv/.installed" if too_old else "",
        is_needed=True,
    )
    yield _megaback_line(machine)
    yield _packages_line(machine)
    if "torch" in torch:
        build = f"for CUDA {torch['cuda_build']}" if torch["cuda_build"] else "for CPUs only"
        yield Line("torch", "yes", f"{torch['torch']}, built {build}", is_needed=True)
    else:
        yield Line("torch", "no", problems.get("torch", "not installed"), _INSTALL, is_needed=True)
    yield _gpu_line(machine)
    if torch.get("deepspeed"):
        yield Line("DeepSpeed", "yes", torch["deepspeed"], is_needed=True)
    else:
        why = problems.get("deepspeed", "torch is needed first")
        yield Line("DeepSpeed", "no", why, _INSTALL, is_needed=True)
    backends = [name for name in ("gloo", "nccl") if torch.get(name)]
    yield Line(
        "communication",
        "yes" if "gloo" in backends else "no",
        " and ".join(backends) or "neither gloo nor nccl",
        "" if "gloo" in backends else "pip install --force-reinstall torch",
        is_needed=True,
    )
    yield _slurm_line(machine)
    low = machine.disk_free_bytes < _ENOUGH_DISK_BYTES
    writable = machine.is_writable
    yield Line(
        "disk",
        "no" if not writable or not machine.disk_free_bytes else "note" if low else "yes",
        f"{machine.disk_free_bytes / 1e9:,.1f} GB free for runs in {machine.folder}"
        + ("" if writable else ", which is not writable"),
        "" if writable and not low else "choose another folder: run=/path/of/the/run",
        is_needed=True,
    )
    yield from _limits(machine)


def _packages_line(machine: Machine) -> Line:
    unread = [f"{name} is missing: no {SOURCE_PACKAGES[name]}" for name in machine.unread]
    text = "; ".join((*machine.unmet, *unread)) or "all required ones"
    if machine.unmet:
        return Line("packages", "no", text, _INSTALL, is_needed=True)
    if unread:
        return Line("packages", "note", text, f"pip install {' '.join(machine.unread)}")
    return Line("packages", "yes", text, is_needed=True)


def _megaback_line(machine: Machine) -> Line:
    if machine.sharing:
        text = f"{machine.megaback}; {', '.join(machine.sharing)} has packages of the same names"
        fix = "install megaback in an environment of its own"
    elif machine.hidden:
        text = f"{machine.megaback}; this folder hides {', '.join(machine.hidden)}"
        fix = "use `megaback` here, not `python -m megaback`; "
        fix += "run your own scripts elsewhere, or rename them"
    else:
        text, fix = machine.megaback, ""
    return Line("megaback", "note" if fix else "yes", text, fix)


def _gpu_line(machine: Machine) -> Line:
    devices = machine.torch.get("devices", [])
    if devices:
        names = sorted({device["name"] for device in devices})
        smallest = min(device["memory_bytes"] for device in devices)
        text = f"{len(devices)} x {', '.join(names)}, {smallest / 1e9:.0f} GB"
        return Line("GPUs", "yes", text, is_needed=True)
    driver = f" (driver: {machine.driver})" if machine.driver else ""
    if not machine.num_gpus:
        return Line("GPUs", "note", f"none{driver}: runs need hardware.device=cpu or auto")
    text = f"{machine.num_gpus}{driver}, but torch sees none"
    if machine.torch.get("cuda_build") is None:
        fix = "install a CUDA build of torch: https://pytorch.org/get-started/locally/"
    else:
        fix = "check with nvidia-smi that the driver is new enough for this build of torch"
    return Line("GPUs", "no", text, fix, is_needed=True)


def _slurm_line(machine: Machine) -> Line:
    if machine.slurm_problem is not None:
        return Line("Slurm", "no", machine.slurm_problem, "ask your cluster's administrators")
    if "sbatch" not in machine.programs:
        return Line("Slurm", "note", "no sbatch; on a cluster, log in to a node that has it")
    return Line("Slurm", "yes", "; ".join(machine.partitions) or "no partitions")


def _limits(machine: Machine) -> Iterator[Line]:
    shm = machine.shm_free_bytes
    if shm is not None:
        small = shm < _ENOUGH_SHM_BYTES
        fix = "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm" if small else ""
        yield Line(
            "shared memory",
            "note" if small else "yes",
            f"{shm / 1e9:,.1f} GB free in /dev/shm",
            fix,
        )
    few = 0 <= machine.open_files < _ENOUGH_FILES
    yield Line(
        "open files",
        "note" if few else "yes",
        "no limit" if machine.open_files < 0 else f"{machine.open_files:,} per process",
        "ulimit -n $(ulimit -H -n)" if few else "",
    )
    yield Line(
        "locked memory",
        "yes",
        "no limit"
        if machine.locked_bytes < 0
        else f"{machine.locked_bytes / 1e6:,.1f} MB (InfiniBand needs no limit)",
    )
    threads = machine.threads
    excess = threads is not None and threads.isdigit() and int(threads) > machine.cores
    yield Line(
        "cores",
        "note" if excess else "yes",
        f"{machine.cores}, {machine.memory_bytes / 1e9:,.0f} GB of memory; OMP_NUM_THREADS "
        + (
            f"is {threads}"
            if threads
            else "is not set: megaback train divides the cores among the ranks"
        ),
        "unset OMP_NUM_THREADS" if excess else "",
    )
    if "cc" not in machine.programs:
        fix = "apt-get install build-essential"
        yield Line("C compiler", "note", "none: training.compile needs one", fix)


def _abilities(machine: Machine) -> Iterator[Line]:
    torch = machine.torch
    has_torch = bool(torch.get("torch") and torch.get("deepspeed") and torch.get("gloo"))
    has_gpu = bool(torch.get("devices"))
    yield _ability("build shards", not machine.unmet, _INSTALL, is_needed=True)
    yield _ability("train on CPUs", has_torch, _INSTALL, is_needed=True)
    gpu_fix = _gpu_line(machine).fix or "a machine with NVIDIA GPUs"
    yield _ability("train on GPUs", has_torch and has_gpu and bool(torch.get("nccl")), gpu_fix)
    if has_torch:
        yield _attention_line(torch.get("attention"), torch["problems"].get("attention", ""))
    has_ssh = "ssh" in machine.programs
    yield _ability(
        "train on several hosts (--hostfile)", has_torch and has_ssh, "apt-get install ssh"
    )
    has_slurm = {"sbatch", "srun"} <= set(machine.programs) and machine.slurm_problem is None
    yield _ability("train on a Slurm cluster", has_slurm, "log in to a node that has sbatch")
    yield _ability("convert and sample", bool(torch.get("torch")), _INSTALL, is_needed=True)


def _attention_line(attention: dict[str, Any] | None, problem: str) -> Line:
    """Backends of attention, with the one that `hardware.attention=auto` chooses first."""
    if attention is None:
        return Line("attention", "no", problem, "check the driver with nvidia-smi")
    usable = [name for name, reason in attention["kernels"].items() if reason is None]
    why_not = "; ".join(f"{name}: {why}" for name, why in attention["kernels"].items() if why)
    shown = f"auto is {attention['auto']}"
    if usable:
        others = ", ".join((*usable[1:], "sdpa"))
        return Line("attention", "yes", f"{shown}; {others} also work")
    is_cpu = all(why == "the device is cpu" for why in attention["kernels"].values())
    if is_cpu:
        return Line("attention", "yes", f"{shown}, the one for CPUs")
    return Line("attention", "note", f"{shown}, which is slow ({why_not})", attention["install"])


def _ability(name: str, works: bool, fix: str, is_needed: bool = False) -> Line:
    if works:
        return Line(name, "yes", "works", is_needed=is_needed)
    return Line(name, "no", "does not work here", fix, is_needed)


def _print_table(lines: Sequence[Line]) -> None:
    from rich.table import Table
    from rich.text import Text

    from data_pipeline.common.rich_console import SafeConsole

    colors = {"yes": "green", "note": "yellow", "no": "red"}
    table = Table(show_edge=False)
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for line in lines:
        table.add_row(line.name, Text(line.state, colors[line.state]), line.text, line.fix)
    print_table(SafeConsole(highlight=False), table)


@click.command(
    cls=Command,
    name="doctor",
    epilog=examples(
        "megaback doctor",
        "megaback doctor /scratch/runs --json",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs"))
@json_option
def main(folder: Path, as_json: bool) -> None:
    """Check what works on this machine, and suggest fixes for what does not.

    FOLDER is where runs will be written. The exit code is 0 if this machine can build shards,
    and train and run models (on its GPUs, if any), and 3 otherwise.
    """
    machine = examine(folder)
    lines = explain(machine)
    ready = is_ready(lines)
    if as_json:
        fields = {"ready": ready, "machine": asdict(machine), "lines": [asdict(x) for x in lines]}
        click.echo(json.dumps(fields, indent=2))
    elif sys.stdout.isatty():
        _print_table(lines)
    else:
        for line in lines:
            fix = f" -> {line.fix}" if line.fix else ""
            echo(f"{line.state:4} {line.name}: {line.text}{fix}")
    if not as_json:
        if ready:
            click.echo("\nThis machine is ready.")
            show_next(
                {command("tokenizer", "train", "--source", "novels", "--out", "data/tokenizer"): ""}
            )
        else:
            click.echo("\nThis machine is not ready: fix the lines with `no`, from the top.")
    raise SystemExit(0 if ready else NOT_READY)


if __name__ == "__main__":
    main()
