"""A rank that trains one run after another: a real rank, without its start-up.

For each run it reads a JSON line from stdin (`config`, `overrides`, `output`: a file for its
output), and prints a line: null, or the error. See warm_ranks.py.
"""

import faulthandler
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
    """Train a run to its end. Returns the error, if any."""
    os.chdir(folder)
    settings = load_config(Path(config), tuple(overrides))
    before = os.dup(2)
    with Path(output).open("a") as file, redirect_stdout(file), redirect_stderr(file):
        os.dup2(file.fileno(), 2)  # may be in the run's folder if it is the output
        try:
            watchdog = Watchdog(settings.run, settings.hardware, world)
            train_run(settings, world, StopRequest(None), watchdog, Path(config))
        except (Exception, SystemExit):  # noqa: BLE001 - reported by the test
            return traceback.format_exc()
        finally:
            os.dup2(before, 2)
            os.close(before)
    return None


def main() -> None:
    """Train the requested runs until stdin ends."""
    faulthandler.enable()
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps the output of libraries apart from the answers
    set_up_logging()
    world = start_world("cpu", 60)
    for line in sys.stdin:
        problem = train(world, **json.loads(line))
        gc.collect()  # frees the engine and its files
        print(json.dumps(problem), file=answers, flush=True)
    end_rank()


if __name__ == "__main__":
    main()
