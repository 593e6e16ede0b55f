"""A virtual environment with megaback installed from a wheel, and folders of hostile packages."""

import subprocess
import sys
import venv
from pathlib import Path

from data_pipeline.common.locks import locked
from requirements.wheelhouse import own_wheel

OWN_PACKAGES = ("data_pipeline", "launcher", "tools")
TRAP = "raise SystemExit('the working directory was imported')\n"
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def wheel_environment(folder: Path) -> Path:
    """The environment's root, made once for all test processes; it shares our packages."""
    root = folder / "environment"
    with locked(folder / "lock"):
        if not (folder / "is_whole").exists():
            _install(own_wheel(folder), root)
            (folder / "is_whole").touch()
    return root


def _install(wheel: Path, root: Path) -> None:
    venv.create(root, symlinks=True)
    (packages,) = root.glob("lib/python*/site-packages")
    here = Path(sys.prefix, packages.relative_to(root))
    (packages / "others.pth").write_text(f"{here}\n")  # without the .pth files there
    pip = (*_PIP, "--python", root / "bin" / "python")
    words = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    subprocess.run([*pip, *words], check=True, capture_output=True, timeout=120)


def plant(folder: Path, *names: str, content: str = TRAP) -> Path:
    """Make packages of these names in a folder."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(content)
    return folder
