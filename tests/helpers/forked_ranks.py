"""Real ranks as forks of a process that has imported torch and DeepSpeed once.

Imports take most of the time and memory of a tiny rank.
"""

import os
import sys
import traceback
from collections.abc import Callable

from launcher.ranks.local import rank_names


def run_forked(world_size: int, rank_main: Callable[[], None]) -> None:
    """Call `rank_main` on every rank, in an environment that names it.

    Raises SystemExit if a rank fails; the others, which may wait for it, are killed.
    """
    sys.stdout.flush()
    ranks = {_fork(names, rank_main) for names in rank_names(world_size)}
    has_failed = False
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not has_failed:
            has_failed = True
            for other in ranks:
                os.kill(other, 9)
    if has_failed:
        raise SystemExit(1)


def _fork(names: dict[str, str], rank_main: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(names)
    try:
        rank_main()
    except BaseException:  # noqa: BLE001 - the parent's frames must not run in a fork
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
