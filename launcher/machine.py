"""Facts of this machine: hardware, limits and programs. Loads no torch in this process."""

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
from data_pipeline.common.packages import SOURCE_PACKAGES, is_installed
from megaback import __version__
from megaback.distributed.visible_devices import count_devices
from megaback.installation import ROOT, hidden_by, sharing_distributions
from megaback.planning.host_memory import host_memory_bytes

_PROBE = module_command("megaback.distributed.torch_facts")
_PROBE_TIMEOUT_S = 180.0
_COMMAND_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Machine:
    """Facts of a machine, which `doctor.explain` interprets."""

    host: str
    megaback: str
    """Version and folder of megaback."""
    hidden: tuple[str, ...]
    """Installed modules that files in the working directory hide."""
    sharing: tuple[str, ...]
    """Other distributions with packages of megaback's names."""
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
    """Current limit; -1 for none."""
    max_open_files: int
    """Maximum to which the limit may be raised."""
    locked_bytes: int
    """Limit of locked memory; -1 for none."""
    num_gpus: int
    """Number of GPUs that the driver shows."""
    driver: str | None
    unmet: tuple[str, ...]
    """Required packages that are missing or of another version, with the reason."""
    unread: tuple[str, ...]
    """Missing packages that only some sources need."""
    programs: tuple[str, ...]
    """Programs on the PATH, of those that megaback can use."""
    partitions: tuple[str, ...]
    """Slurm partitions: name, nodes, generic resources, time limit."""
    slurm_problem: str | None = None
    torch: dict[str, Any] = field(default_factory=dict)
    """Facts of `megaback.distributed.torch_facts`; `problems` names failed imports."""


def examine(folder: Path) -> Machine:
    """Collect the facts of this machine. Takes as long as importing torch and DeepSpeed."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    shm = Path("/dev/shm")  # noqa: S108 (only read)
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
        unread=tuple(name for name in SOURCE_PACKAGES if not is_installed(name)),
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
            if requirement.name not in SOURCE_PACKAGES:
                unmet.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name} is {found}, but {requirement.specifier} is needed")
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
        return (), f"sinfo timed out after {_COMMAND_TIMEOUT_S:.0f} s"
    if listing.returncode:
        return (), (listing.stderr.strip().splitlines() or ["sinfo failed"])[-1]
    return tuple(listing.stdout.splitlines()), None


def _torch_facts() -> dict[str, Any]:
    try:
        probe = subprocess.run(
            _PROBE, capture_output=True, text=True, check=False, timeout=_PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {"problems": {"torch": f"its import timed out after {_PROBE_TIMEOUT_S:.0f} s"}}
    try:
        found: dict[str, Any] = json.loads(probe.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (probe.stderr.strip().splitlines() or [""])[-1]
        return {"problems": {"torch": f"its import exited with code {probe.returncode}: {last}"}}
    return found
