"""Unknown clients at the ports of a run's ranks: the run survives, and listens on loopback only."""

import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_run import wait_for_step

pytestmark = pytest.mark.slow

# First message that PyTorch's store expects of a client: query type 0 and a magic number.
_GREETING = struct.pack("<BI", 0, 0x3C85F7CE)
RUBBISH = [
    b"",
    b"\xff" * 4096,
    b"GET / HTTP/1.0\r\n\r\n",
    bytes(range(256)) * 300,
    *(_GREETING + struct.pack("<BQ", query, 1 << 62) + b"A" * 1000 for query in range(16)),
]


def _processes(parent: int) -> Iterator[int]:
    yield parent
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _processes(int(child))


def _listening(parent: int) -> set[tuple[str, int]]:
    """Addresses, as hexadecimal, and ports at which a process and its children listen."""
    sockets = set()
    for process in _processes(parent):
        for link in Path(f"/proc/{process}/fd").iterdir():
            found = re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink()))
            sockets |= {found[1]} if found else set()
    found_at = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                address, _, port = local.partition(":")
                found_at.add((address, int(port, 16)))
    return found_at


def test_garbage_at_every_port_of_a_run_does_not_end_it(
    tmp_path: Path, start_training: Callable[..., "subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    process = start_training(run, "training.steps=60", "validation.every_steps=null")
    wait_for_step(process, run, 3)
    places = _listening(process.pid)
    assert places
    assert {address for address, _ in places} <= {"0100007F", "0" * 24 + "01000000"}
    strangers = []
    for _, port in places:
        for rubbish in RUBBISH:
            stranger = socket.create_connection(("127.0.0.1", port), timeout=5)
            strangers.append(stranger)
            stranger.sendall(rubbish)

    output = run / "output.txt"
    assert process.wait(60) == 0, output.read_text()
    assert "Traceback" not in output.read_text()
    for stranger in strangers:
        stranger.close()
