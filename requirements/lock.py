"""Writes the locked files: every package that `make HASHES=yes` installs, by version and SHA-256.

`make lock` runs it, after constraints.txt or setup.py was changed. Versions that still fit stay.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
FILES = {
    "locked-build.txt": ("what builds packages that have no wheel; installed first", "setuptools"),
    "locked-cuda.txt": (
        "torch for CUDA, and what it alone needs",
        "torch|triton|nvidia-.*|cuda-.*",
    ),
    "locked.txt": ("everything but torch", ".*"),
}
"""Contents of each file, and its packages as a pattern: the first file that fits has a package."""
CPU_FILE = "locked-cpu.txt"
DOCS_FILE = "locked-docs.txt"
_HEAD = """\
# By requirements/lock.py (`make lock`): {}.
# All files of a version may be installed: those of every platform and of Python 3.10 and newer.
"""
_CPU_HEAD = """\
# By requirements/lock.py (`make lock`): torch for CPUs, which PyPI does not have. Only the wheels
# that pip found where this file was written are listed; with others, locked-cuda.txt is installed.
"""


def requirements_of(text: str) -> list[str]:
    """The requirements of a file, each with its hashes."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    return re.findall(r"^\S.*\n(?:\s.*\n)*", "".join(lines), re.MULTILINE)


def resolved(folder: Path) -> list[str]:
    """Requirements of a development install, on every platform."""
    out = folder / "locked.txt"
    paths = [HERE / name for name in FILES]
    out.write_text("".join(path.read_text() for path in paths if path.exists()))
    return compiled(["setup.py", "--extra", "dev"], out)


def of_docs(folder: Path) -> list[str]:
    """Requirements of the site alone; packages that locked.txt has too are of the same version."""
    (wanted,) = re.findall(r'"docs": \["(.+)"\]', (HERE.parent / "setup.py").read_text())
    asked, out = folder / "docs.in", folder / DOCS_FILE
    asked.write_text(wanted)
    out.write_text((HERE / DOCS_FILE).read_text() if (HERE / DOCS_FILE).exists() else "")
    return compiled([str(asked), "--constraint", str(HERE / "locked.txt")], out)


def compiled(wanted: list[str], out: Path) -> list[str]:
    """Requirements by uv's resolver, which keeps the versions in the file where they fit."""
    command = [sys.executable, "-m", "uv", "pip", "compile", *wanted]
    command += ["--constraint", "constraints.txt", "--universal", "--python-version", "3.10"]
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--output-file", str(out)]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    subprocess.run(command, cwd=HERE.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    return requirements_of(out.read_text())


def cpu_torch(torch: str, folder: Path) -> str:
    """The file for torch on CPUs, if pip takes such a wheel here; else what there is of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), torch], check=True)
    (wheel,) = folder.glob("torch-*.whl")
    requirement = f"{torch}+cpu"
    before = (HERE / CPU_FILE).read_text() if (HERE / CPU_FILE).exists() else ""
    hashes = re.findall(r"sha256:\w+", before) if requirement in before else []
    if wheel.name.startswith(f"{requirement.replace('==', '-')}-"):
        hashes.append("sha256:" + hashlib.sha256(wheel.read_bytes()).hexdigest())
    lines = [requirement, *(f"    --hash={one}" for one in sorted(set(hashes)))]
    return _CPU_HEAD + " \\\n".join(lines) + "\n"


def main() -> None:
    with TemporaryDirectory() as folder:
        found = resolved(Path(folder))
        torch = next(one for one in found if one.startswith("torch==")).split()[0]
        cpu = cpu_torch(torch, Path(folder))
    for name, (what, pattern) in FILES.items():
        ours = [one for one in found if re.fullmatch(pattern, one.partition("==")[0])]
        found = [one for one in found if one not in ours]
        (HERE / name).write_text(_HEAD.format(what) + "".join(ours))
    (HERE / CPU_FILE).write_text(cpu)
    with TemporaryDirectory() as folder:
        docs = of_docs(Path(folder))
    head = _HEAD.format("the site of `make docs`, in an environment of its own")
    (HERE / DOCS_FILE).write_text(head + "".join(docs))


if __name__ == "__main__":
    main()
