"""A rank that trains one run after another: what a real rank does, without its start.

It reads a JSON line from stdin for each run (`config`, `overrides`, `output`: a file for what is
printed), and answers with a line: null, or what went wrong. See warm_ranks.py.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from data_pipeline.common.logging_setup import set_up_logging
from megaback.config_file import load_config
from megaback.distributed.world import World, end_rank, start_world
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.train import train_run


def train(world: World, config: str, overrides: list[str], output: str, folder: str) -> str | None:
    """Train a run to its end; what went wrong, if anything."""
    os.chdir(folder)
    settings = load_config(Path(config), tuple(overrides))
    before = os.dup(2)
    with Path(output).open("a") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 2)  # a file in the run's folder may be there if it is printed to
        try:
            watchdog = Watchdog(settings.run, settings.hardware, world)
            train_run(settings, world, StopRequest(None), watchdog, Path(config))
        except (Exception, SystemExit):  # noqa: BLE001 (the test says what it was)
            return traceback.format_exc()
        finally:
            os.dup2(before, 2)
            os.close(before)
    return None


def main() -> None:
    """Train what is asked for until stdin ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    set_up_logging()
    world = start_world("cpu", 60)
    for line in sys.stdin:
        problem = train(world, **json.loads(line))
        gc.collect()  # the engine, and what it has open
        print(json.dumps(problem), file=answers, flush=True)
    end_rank()


if __name__ == "__main__":
    main()
