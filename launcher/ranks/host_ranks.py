"""`python -m launcher.ranks.host_ranks`: the ranks of one host, for a launcher on another one.

The first line of stdin is the order, as JSON; each later line is the number of a signal for every
rank. Stdin ends when the launcher or the connection does: the ranks are then asked to save, and
their output is discarded. The exit code is that of the first rank that gave a reason, else of the
first that failed; 128 plus the number of the signal for one that was killed.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from threading import Thread
from typing import IO, Any

from launcher.ranks.local import (
    Running,
    rank_environment,
    reasons,
    start_rank,
    wait_for_ranks,
)

_CHUNK_BYTES = 1 << 16


def run_order(channel: IO[bytes]) -> int:
    """Start the ranks of the order, and wait for them. Returns the exit code."""
    order: dict[str, Any] = json.loads(channel.readline())
    os.environ.update(order["environment"])
    environment = rank_environment(len(order["names"]))
    pipes = [os.pipe(), os.pipe()]
    forwarding = [
        Thread(target=_forward, args=(pipe[0], number), daemon=True)
        for number, pipe in enumerate(pipes, 1)
    ]
    ranks: list[subprocess.Popen[bytes]] = []

    def start_all() -> Iterator[Running]:
        for names in order["names"]:
            outputs = [pipe[1] for pipe in pipes]
            ranks.append(start_rank(order["command"], {**environment, **names}, *outputs))
            yield ranks[-1]
        Thread(target=_listen, args=(channel, ranks), daemon=True).start()

    for thread in forwarding:
        thread.start()
    ended, _ = wait_for_ranks(start_all(), order["grace_s"])
    for pipe in pipes:
        os.close(pipe[1])
    for thread in forwarding:
        thread.join(timeout=5)  # a rank's own child may still hold its output open
    return code_of([code for _, code in ended])


def code_of(codes: Sequence[int]) -> int:
    """One exit code for ranks that ended in this order."""
    with_reason = [code for code in codes if code in reasons()]
    code = next(iter([*with_reason, *filter(None, codes)]), 0)
    return 128 - code if code < 0 else code


def _listen(channel: IO[bytes], ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
    for line in channel:
        number = int(line)
        if number == signal.SIGKILL:
            for rank in ranks:
                rank.kill()
        else:
            os.kill(os.getpid(), number)  # the main thread passes it on
    os.kill(os.getpid(), signal.SIGTERM)


def _forward(source: int, target: int) -> None:
    """Copy the ranks' output until the target closes; then discard it."""
    is_read = True
    while chunk := os.read(source, _CHUNK_BYTES):
        while chunk and is_read:
            try:
                chunk = chunk[os.write(target, chunk) :]
            except OSError:
                is_read = False


def main() -> int:
    """Serve the launcher at the other end of stdin."""
    # Unbuffered: a thread that waits for a line would hold a buffer's lock at exit. A copy: the
    # ranks would inherit stdin itself.
    channel = os.fdopen(os.dup(0), "rb", buffering=0)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 (only its descriptor)
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # survive the end of the connection
    return run_order(channel)


if __name__ == "__main__":
    sys.exit(main())
