"""A private ssh server on this machine, to which two host names lead.

It listens on a free port of the loopback interface, with keys made for it.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HOSTS = ("node-a", "node-b")
_SERVER = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@dataclass(frozen=True)
class PrivateSshd:
    """A running server, and its client configuration."""

    folder: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """For `megaback train --hostfile`; `ssh` on the PATH is for programs without an option."""
        return {
            "MEGABACK_SSH": f"ssh -F {self.folder / 'config'}",
            "MASTER_ADDR": "127.0.0.1",
            "PATH": f"{self.folder}{os.pathsep}{os.environ['PATH']}",
        }

    def connections(self) -> list[int]:
        """Process ids of the server's connections."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.pid)], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]


@contextmanager
def private_sshd(folder: Path) -> Iterator[PrivateSshd]:
    """Run a server; skips the test if sshd is not installed or does not start."""
    if _SERVER is None or shutil.which("ssh") is None:
        pytest.skip("there is no ssh with its server (Debian: openssh-client, openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # required by a server that root starts
    for name in ("server_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "server_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/server_key\nUsePAM no\n"
        f"AuthorizedKeysFile {folder}/user_key.pub\nPidFile none\nStrictModes no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    (folder / "config").write_text(
        f"Host {' '.join(HOSTS)}\n HostName 127.0.0.1\n Port {port}\n LogLevel ERROR\n"
        f" IdentityFile {folder}/user_key\n IdentitiesOnly yes\n"
        " UserKnownHostsFile /dev/null\n StrictHostKeyChecking no\n"
    )
    wrapper = folder / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    wrapper.chmod(0o755)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([_SERVER, "-f", folder / "server_config", "-D", "-e"], stderr=log)
    try:
        give_up = time.monotonic() + 20
        while "listening" not in (folder / "log").read_text():
            if server.poll() is not None or time.monotonic() > give_up:
                pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()}")
            time.sleep(0.02)
        yield PrivateSshd(folder, server.pid)
    finally:
        server.kill()
        server.wait()
