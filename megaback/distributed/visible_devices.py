"""Number of GPUs that a process may use, from the driver's files, without loading torch."""

import os
import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

_AMD_VARIABLES = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


def count_devices() -> int:
    """Number of GPUs for ranks here: by the variables that select some, else by the driver's files.

    0 if unknown, as under WSL2: a rank still uses the GPU that torch sees.
    """
    variables = _AMD_VARIABLES if _is_rocm() else ("CUDA_VISIBLE_DEVICES",)
    selected = [len(names_in(os.environ[name])) for name in variables if name in os.environ]
    return min(selected) if selected else count_device_files()


def names_in(variable: str) -> list[str]:
    """Indices, UUIDs or MIG names in CUDA_VISIBLE_DEVICES, up to the first invalid one, as CUDA."""
    names = (name.strip() for name in variable.split(","))
    return list(takewhile(lambda name: name not in ("", "-1"), names))


def count_device_files(root: Path = Path("/")) -> int:
    """Number of GPUs of the kind that torch is built for, by the driver's files."""
    if _is_rocm():
        nodes = root.glob("sys/class/kfd/kfd/topology/nodes/*")
        return sum(_is_amd_gpu(node, root) for node in nodes)
    return len([path for path in root.glob("dev/nvidia*") if path.name[6:].isdigit()])


def _is_amd_gpu(node: Path, root: Path) -> bool:
    """Whether a node of ROCm's topology is a GPU that this container may open."""
    try:
        found = re.search(r"^drm_render_minor (\d+)$", (node / "properties").read_text(), re.M)
    except OSError:
        return False
    return found is not None and (root / f"dev/dri/renderD{found[1]}").exists()


def _is_rocm() -> bool:
    """Whether the installed torch is built for AMD's GPUs."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^hip\b.*=\s*['\"]", text, re.M) is not None
