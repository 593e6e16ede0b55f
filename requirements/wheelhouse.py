"""Writes a wheelhouse: a folder that installs megaback without a network, beside a torch.

    python requirements/wheelhouse.py --out build/wheelhouse [--python-version 3.12] [--extras gguf]

`make wheelhouse` runs it. Wheels have the versions and hashes of locked.txt; DeepSpeed, which is
published as source, is built without its own kernels, which megaback does not use. The packages are
those that the wheels themselves require, found wheel by wheel, for the Python that is asked for.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import click
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from data_pipeline.common.command import Command
from data_pipeline.common.output_folder import require_output_folder, whole_folder
from data_pipeline.common.packages import SOURCE_PACKAGES
from data_pipeline.errors import BackendError, ConfigError

ROOT = Path(__file__).parents[1]
LOCKED = ROOT / "requirements" / "locked.txt"
TESTS = ("hypothesis", "pytest", "pytest-timeout")
"""Packages for tests/gpu."""
OMITTED = tuple(SOURCE_PACKAGES)
"""75 MB with what they require."""
_THERE = "torch"
_BUILT = "deepspeed"
"""It has no wheel of its own."""
_MAX_BYTES = 60_000_000
"""Without extras, for machines that take no more at a time."""
_GLIBC = range(28, 4, -1)
"""Minor versions of glibc 2 for which wheels are taken, newest first."""
_OWN_FOLDERS = ("megaback", "data_pipeline", "launcher", "tools", "configs", "slurm")
_OWN_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
_README = """\
# megaback {version} without a network
{megabytes:.0f} MB of wheels for CPython {python} on Linux (x86_64, glibc 2.{glibc} or newer),
beside a torch of 2.11 or newer, which is not in here. In an environment that has torch:
```
python -m pip install --no-index --find-links FOLDER --no-deps -r FOLDER/requirements.txt
```
with this folder as FOLDER. To leave a system's Python as it is, make an environment that sees its
packages first: `python -m venv --system-site-packages .venv`. pip compares each file with the
hashes in requirements.txt; `sha256sum --check SHA256SUMS`, in this folder, compares all.
{omitted}"""
_OMITTED_README = """
These requirements of megaback are omitted, so `pip check` names them:

| package | missing without it |
|---|---|
{rows}

Text is encoded to the same ids, somewhat slower.
"""


@dataclass(frozen=True)
class Target:
    """The Python on which the wheels are installed: CPython on Linux, x86_64."""

    python: str

    @property
    def platforms(self) -> list[str]:
        return [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC] + [
            "manylinux2014_x86_64",
            "manylinux2010_x86_64",
            "manylinux1_x86_64",
        ]

    @property
    def tags(self) -> set[Tag]:
        version = tuple(map(int, self.python.split(".")))
        interpreter = "cp" + self.python.replace(".", "")
        return {
            *cpython_tags(version, platforms=self.platforms),
            *compatible_tags(version, interpreter, self.platforms),
        }

    def environment(self, extra: str = "") -> dict[str, str]:
        """Values of the markers of requirements."""
        return {
            **{name: str(value) for name, value in default_environment().items()},
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "platform_machine": "x86_64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "extra": extra,
        }

    def wants(self, requirement: Requirement, extras: Iterable[str] = ()) -> bool:
        """Whether a requirement of a package that is asked for with extras holds here."""
        marker = requirement.marker
        return marker is None or any(marker.evaluate(self.environment(x)) for x in ("", *extras))


def locked_pins(text: str, target: Target) -> dict[str, str]:
    """Lines of a locked file, hashes included, by package, for a target."""
    found: dict[str, str] = {}
    for lines in re.findall(r"^[^\s#].*\n(?:\s.*\n)*", text, re.MULTILINE):
        requirement = Requirement(lines.partition("\\\n")[0].strip())
        if target.wants(requirement):
            found[canonicalize_name(requirement.name)] = lines
    return found


def own_wheel(folder: Path) -> Path:
    """Build megaback's wheel into a folder, from a copy of its files only.

    A build in the checkout would pack modules of earlier builds.
    """
    with TemporaryDirectory() as name:
        source = Path(name)
        for member in _OWN_FOLDERS:
            shutil.copytree(ROOT / member, source / member)
        for member in _OWN_FILES:
            shutil.copy(ROOT / member, source / member)
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("megaback-*.whl")
    return wheel


def fill(
    folder: Path,
    own: Path,
    pins: Mapping[str, str],
    target: Target,
    extras: Iterable[str] = (),
    omitted: Iterable[str] = OMITTED,
    also: Iterable[str] = TESTS,
) -> None:
    """Add every wheel that megaback's own wheel requires, and those that they require.

    `extras`: of megaback; `omitted` and torch are skipped, `also` is added. Raises BackendError
    and ConfigError.
    """
    skipped = {_THERE, *omitted}
    seen: set[tuple[str, frozenset[str]]] = set()
    new = [*_requirements(own, target, extras), *map(Requirement, also)]
    while new:
        asked = {
            (canonicalize_name(one.name), frozenset(one.extras)): one
            for one in new
            if canonicalize_name(one.name) not in skipped
        }
        asked = {key: one for key, one in asked.items() if key not in seen}
        seen |= asked.keys()
        there = wheels_of(folder)
        _add(folder, sorted({name for name, _ in asked} - there.keys()), pins, target)
        wheels = wheels_of(folder)
        new = []
        for (name, wanted_extras), requirement in asked.items():
            _, version, _, _ = parse_wheel_filename(wheels[name].name)
            if not requirement.specifier.contains(version, prereleases=True):
                raise ConfigError(f"{requirement} is required, but locked.txt has {version}")
            new += _requirements(wheels[name], target, wanted_extras)
    for path in wheels_of(folder).values():
        if not parse_wheel_filename(path.name)[3] & target.tags:
            raise BackendError(f"{path.name} does not fit Python {target.python}")


def wheels_of(folder: Path) -> dict[str, Path]:
    """Wheels in a folder by package."""
    return {parse_wheel_filename(path.name)[0]: path for path in sorted(folder.glob("*.whl"))}


def describe(folder: Path, target: Target, omitted: Iterable[str]) -> int:
    """Write requirements.txt, README.md and SHA256SUMS; returns the size of all in bytes."""
    wheels = wheels_of(folder)
    lines = ["# Written by `make wheelhouse`; README.md has the command that installs it.\n"]
    for name, path in wheels.items():
        version = parse_wheel_filename(path.name)[1]
        lines.append(f"{name}=={version} --hash=sha256:{_sha256(path)}\n")
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")
    rows = "\n".join(f"| {name} | {SOURCE_PACKAGES[name]} |" for name in omitted)
    readme = _README.format(
        version=parse_wheel_filename(wheels["megaback"].name)[1],
        python=target.python,
        glibc=_GLIBC[0],
        megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        omitted=_OMITTED_README.format(rows=rows) if rows else "",
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def _add(folder: Path, names: Sequence[str], pins: Mapping[str, str], target: Target) -> None:
    """Download or build wheels of locked versions, whose hashes pip checks."""
    if absent := [name for name in names if name not in pins]:
        raise ConfigError(
            f"{', '.join(absent)}: not in {LOCKED.name}, from which versions and hashes are taken; "
            "run `make lock` after a change of setup.py"
        )
    platforms = [word for name in target.platforms for word in ("--platform", name)]
    download = ["download", "--python-version", target.python, "--implementation", "cp"]
    download += ["--only-binary", ":all:", *platforms, "--dest"]
    built = [name for name in names if name == _BUILT]
    for command, chosen in (
        (["wheel", "--no-build-isolation", "--wheel-dir"], built),
        (download, [name for name in names if name not in built]),
    ):
        if chosen:
            with TemporaryDirectory() as scratch:
                path = Path(scratch, "wanted.txt")
                path.write_text("".join(pins[name] for name in chosen), encoding="utf-8")
                _pip(*command, folder, "--no-deps", "--require-hashes", "-r", path)


def extras_of(wheel: Path) -> set[str]:
    """Extras that a wheel has."""
    return set(_metadata(wheel).get_all("Provides-Extra", []))


def _requirements(wheel: Path, target: Target, extras: Iterable[str]) -> Iterator[Requirement]:
    """Requirements of a wheel on a target."""
    for line in _metadata(wheel).get_all("Requires-Dist", []):
        requirement = Requirement(line)
        if target.wants(requirement, extras):
            yield requirement


def _metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        (name,) = [
            one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one)
        ]
        return message_from_bytes(archive.read(name))


def _pip(*words: object) -> None:
    """Run pip. Raises BackendError with its last line."""
    environment = {**os.environ, "DS_BUILD_OPS": "0"}
    done = subprocess.run(
        [*_PIP, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = " ".join(reasons[:2]) or done.stderr.strip()[-500:]
        raise BackendError(f"pip {words[0]} failed: {reason}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@click.command(cls=Command)
@click.option(
    "--out",
    default="build/wheelhouse",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder to write; an earlier wheelhouse is replaced, nothing else.",
)
@click.option("--python-version", default="3.12", show_default=True, help="Python of the target.")
@click.option(
    "--extras",
    default="",
    help=f"Extras of megaback to add, or {' and '.join(OMITTED)}, separated by commas.",
)
def main(out: Path, python_version: str, extras: str) -> None:
    """Write a folder of wheels that installs megaback without a network."""
    if not re.fullmatch(r"3\.\d+", python_version) or int(python_version[2:]) < 10:
        raise ConfigError(f"--python-version {python_version}: 3.10 or newer is needed, as in 3.12")
    target = Target(python_version)
    asked = set(filter(None, re.split(r"[,\s]+", extras)))
    omitted = [name for name in OMITTED if name not in asked]
    require_output_folder(out, overwrite=True)
    with whole_folder(out, overwrite=True) as folder:
        own = own_wheel(folder)
        known = extras_of(own)
        if unknown := sorted(asked - known - set(OMITTED)):
            raise ConfigError(
                f"--extras {','.join(unknown)}: megaback has {', '.join(sorted(known))}"
            )
        pins = locked_pins(LOCKED.read_text(encoding="utf-8"), target)
        fill(folder, own, pins, target, asked & known, omitted)
        num_bytes = describe(folder, target, omitted)
        if num_bytes > _MAX_BYTES and not asked:
            raise ConfigError(
                f"the wheels take {num_bytes / 1e6:.1f} MB, more than {_MAX_BYTES / 1e6:.0f}; "
                "omit another package in requirements/wheelhouse.py"
            )
        num_wheels = len(wheels_of(folder))
    click.echo(f"{out}: {num_wheels} wheels for Python {python_version}, {num_bytes / 1e6:.1f} MB")
    if omitted:
        click.echo(f"omitted: {', '.join(omitted)} (see {out / 'README.md'})")


if __name__ == "__main__":
    main()
