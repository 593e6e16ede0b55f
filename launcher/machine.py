"""What this machine is, found out without loading torch: its own limits, and the programs on it."""

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.common.import_path import module_command
from megaback import __version__
from megaback.distributed.visible_devices import count_devices
from megaback.installation import ROOT, hidden_by, sharing_distributions
from megaback.planning.host_memory import host_memory_bytes

_PROBE = module_command("megaback.distributed.torch_facts")
_PROBE_TIMEOUT_S = 180.0
_COMMAND_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Machine:
    """Facts; `explain` says what they mean."""

    host: str
    megaback: str
    """Version and folder of megaback."""
    hidden: tuple[str, ...]
    """Modules that the working directory holds under the names of installed ones."""
    sharing: tuple[str, ...]
    """Other distributions with packages by megaback's names."""
    python: str
    cores: int
    threads: str | None
    """OMP_NUM_THREADS."""
    memory_bytes: int
    folder: str
    """Folder for the runs."""
    disk_free_bytes: int
    is_writable: bool
    shm_free_bytes: int | None
    open_files: int
    """The limit in force; -1 for none."""
    max_open_files: int
    """Maximum that the limit may be raised to."""
    locked_bytes: int
    """Memory that may be locked; -1 for any amount."""
    num_gpus: int
    """GPUs that the driver shows."""
    driver: str | None
    unmet: tuple[str, ...]
    """Packages that megaback needs, and what is wrong with them."""
    programs: tuple[str, ...]
    """Programs on the PATH, of those that some way of training needs."""
    partitions: tuple[str, ...]
    """Slurm's: name, nodes, generic resources, time limit."""
    slurm_problem: str | None = None
    torch: dict[str, Any] = field(default_factory=dict)
    """Facts of `megaback.distributed.torch_facts`; `problems` names what does not import."""


def examine(folder: Path) -> Machine:
    """Look at this machine. Takes as long as importing torch and DeepSpeed does."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    shm = Path("/dev/shm")  # noqa: S108 (looked at, not written)
    open_files, max_open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    partitions, slurm_problem = _partitions()
    return Machine(
        host=socket.gethostname(),
        megaback=f"{__version__} of {ROOT}",
        hidden=tuple(hidden_by(Path.cwd())),
        sharing=tuple(sharing_distributions()),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        threads=os.environ.get("OMP_NUM_THREADS"),
        memory_bytes=host_memory_bytes(),
        folder=str(folder),
        disk_free_bytes=shutil.disk_usage(there).free,
        is_writable=os.access(there, os.W_OK),
        shm_free_bytes=shutil.disk_usage(shm).free if shm.is_dir() else None,
        open_files=open_files,
        max_open_files=max_open_files,
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        num_gpus=count_devices(),
        driver=_driver(),
        unmet=tuple(_unmet_requirements()),
        programs=tuple(
            name for name in ("cc", "ssh", "pdsh", "sbatch", "srun") if shutil.which(name)
        ),
        partitions=partitions,
        slurm_problem=slurm_problem,
        torch=_torch_facts(),
    )


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.splitlines()[0].removeprefix("NVRM version:").strip()


def _unmet_requirements() -> list[str]:
    try:
        from packaging.requirements import Requirement

        wanted = metadata.requires("megaback") or []
    except (ImportError, metadata.PackageNotFoundError) as problem:
        return [f"{problem.name} is not installed"]
    unmet = []
    for line in wanted:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name} is {found}, and {requirement.specifier} is needed")
    return unmet


def _partitions() -> tuple[tuple[str, ...], str | None]:
    if shutil.which("sinfo") is None:
        return (), None
    try:
        listing = subprocess.run(
            ["sinfo", "--noheader", "--format=%P, %D nodes, %G, %l"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return (), f"sinfo did not answer in {_COMMAND_TIMEOUT_S:.0f} s"
    if listing.returncode:
        return (), (listing.stderr.strip().splitlines() or ["sinfo failed"])[-1]
    return tuple(listing.stdout.splitlines()), None


def _torch_facts() -> dict[str, Any]:
    try:
        probe = subprocess.run(
            _PROBE, capture_output=True, text=True, check=False, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"problems": {"torch": f"importing it takes more than {_PROBE_TIMEOUT_S:.0f} s"}}
    try:
        found: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (probe.stderr.strip().splitlines() or [""])[-1]
        return {"problems": {"torch": f"importing it ended with {probe.returncode}: {last}"}}
    return found
