"""Persistent ranks, so that tests of training results need not wait for ranks to start.

Most of a tiny run's time is its start-up. Start-up, signals, faults and exits are tested with the
command itself; the result of an undisturbed run is the same in ranks that have trained before.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.ranks.local import rank_environment, rank_names
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment


class WarmRanks:
    """Real ranks, started when they are first needed."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._ranks: list[subprocess.Popen[str]] = []

    def train(
        self, config: Path, overrides: Sequence[str], output: Path, folder: Path | None = None
    ) -> None:
        """Train a run to its end, with its output in a file. Raises AssertionError.

        `folder` is the working directory, for relative paths.
        """
        if not self._ranks:
            self._start()
        output.parent.mkdir(parents=True, exist_ok=True)
        request = {"config": str(config), "overrides": list(overrides), "output": str(output)}
        request["folder"] = str(folder or ROOT)
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps(request) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self._ranks if rank.stdout is not None]
        problems = [
            json.loads(answer) if answer else self._how_died(number)
            for number, answer in enumerate(answers)
        ]
        if any(problems):
            self.close()  # other ranks may be waiting for the failed one
        assert not any(problems), "\n".join(filter(None, problems)) + output.read_text()

    def close(self) -> None:
        """Kill the ranks."""
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._ranks = []

    def _how_died(self, rank: int) -> str:
        return f"rank {rank} has died with code {self._ranks[rank].wait(60)}\n"

    def _start(self) -> None:
        environment = training_environment() | rank_environment(self._world_size)
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.warm_rank"],
                env=environment | names,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for names in rank_names(self._world_size)
        ]
