"""Check that every node can write to the run's folder, and read there a file of another node."""

import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common.command import storage_error
from data_pipeline.common.regular_files import open_in_place
from megaback.distributed.world import World
from megaback.run_folder import PREFLIGHT_FOLDER

_BYTES = 4 << 20
_TIMEOUT_S = 10.0
_POLL_S = 0.1


@dataclass(frozen=True)
class DiskFacts:
    """Result of one node's check of the run's folder."""

    node: str
    write_gb_s: float | None = None
    """Throughput of writes, including fsync."""
    read_gb_s: float | None = None
    """Throughput of reading another node's file; with one node, its own, which may be cached."""
    problem: str | None = None
    """Reason why the node cannot write, if so."""
    unread: str | None = None
    """Description of the file that it cannot read, if so."""


def check_shared_disk(run: Path, node: str, world: World) -> list[DiskFacts]:
    """Write a file per node; all nodes read the first node's, and the first node the second's.

    Collective; the files are removed.
    """
    names = world.gather(node, str)
    nodes = list(dict.fromkeys(names))
    leads = names.index(node) == world.rank
    key = world.of_first(random.getrandbits(64), int)
    number = nodes.index(node)
    facts = DiskFacts(node)
    if leads:
        facts = _write(run, node, number, key)
    other = 0 if number else min(1, len(nodes) - 1)
    is_written = world.gather(facts.problem is None, bool)[names.index(nodes[other])]
    if leads and facts.problem is None and is_written:
        facts = _read(run, facts, other, nodes[other], key)
    found = world.gather(facts if leads else None, DiskFacts | None)
    if world.is_first:
        shutil.rmtree(run / PREFLIGHT_FOLDER, ignore_errors=True)
    return [one for one in found if one is not None]


def _content(key: int, number: int) -> bytes:
    return random.Random(key + number).randbytes(_BYTES)


def _path(run: Path, number: int) -> Path:
    return run / PREFLIGHT_FOLDER / f"{number:05d}"


def _write(run: Path, node: str, number: int, key: int) -> DiskFacts:
    content = _content(key, number)
    path = _path(run, number)
    try:
        path.parent.mkdir(exist_ok=True)
        started = time.perf_counter()
        with open_in_place(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return DiskFacts(node, problem=str(storage_error(error)))
    return DiskFacts(node, write_gb_s=_BYTES / (time.perf_counter() - started) / 1e9)


def _read(run: Path, facts: DiskFacts, number: int, writer: str, key: int) -> DiskFacts:
    expected = _content(key, number)
    path = _path(run, number)
    give_up = time.monotonic() + _TIMEOUT_S
    while True:  # a network file system may show a new file late
        started = time.perf_counter()
        try:
            found = path.read_bytes()
        except OSError as error:
            problem = str(storage_error(error))
        else:
            if found == expected:
                speed = _BYTES / (time.perf_counter() - started) / 1e9
                return DiskFacts(facts.node, facts.write_gb_s, speed)
            problem = "its content differs"
        if time.monotonic() > give_up:
            return DiskFacts(
                facts.node,
                facts.write_gb_s,
                unread=f"cannot read the file that node {writer} wrote in {run} ({problem}); `run` "
                "must be on a disk that all nodes share",
            )
        time.sleep(_POLL_S)
