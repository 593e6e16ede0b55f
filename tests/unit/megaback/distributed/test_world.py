"""Exit of a rank's process."""

import os
import subprocess
import sys

_RANK = """
import atexit, os
import megaback.distributed.world as distributed

class AbortsTheTeardown:
    def __del__(self):
        os.abort()

distributed.kept = AbortsTheTeardown()
atexit.register(print, "handler")
print("output")
if {is_rank}:
    distributed.end_rank(7)
"""


def _end(*, is_rank: bool) -> "subprocess.CompletedProcess[str]":
    code = _RANK.format(is_rank=is_rank)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )


def test_an_abort_in_the_teardown_does_not_change_a_ranks_exit_code() -> None:
    usual, rank = _end(is_rank=False), _end(is_rank=True)
    assert usual.returncode < 0  # the teardown does abort
    assert (rank.returncode, rank.stdout, rank.stderr) == (7, "output\nhandler\n", "")


def test_a_rank_whose_output_pipe_is_closed_ends_with_its_code() -> None:
    reader, writer = os.pipe()
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # until the end
    words = [sys.executable, "-c", _RANK.format(is_rank=True)]
    rank = subprocess.Popen(words, stdout=writer, env=buffered)
    os.close(reader)
    os.close(writer)
    assert rank.wait(100) == 7
