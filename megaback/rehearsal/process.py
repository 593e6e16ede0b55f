"""Process that rehearses ranks: `python -m megaback.rehearsal.process DEVICE`, one Job per line.

The libraries are loaded once, and each rank is a fork of this process, so that its memory and
DeepSpeed's global state are its own. CUDA does not work in forks of a process that has used it, so
DeepSpeed is loaded before only for a CPU. One line of JSON per rank is printed: a RankReport, or an
error's class and message.
"""

import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from dataclasses import asdict
from pathlib import Path

from data_pipeline.errors import MegabackError
from megaback.rehearsal.job import Job, as_json
from megaback.rehearsal.rank import prepare_deepspeed, rehearse_rank


def _rehearse(job: Job, rank: int, folder: Path) -> str:
    config = job.config.model_copy(update={"run": folder / "run"})
    config.run.mkdir()
    try:
        report = rehearse_rank(
            config, rank, job.world_size, job.ranks_per_node, skip_arithmetic=job.skip_arithmetic
        )
    except MegabackError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return as_json(error)
    return json.dumps(asdict(report))


def main() -> None:
    """Rehearse the ranks of each job, one after another."""
    warnings.simplefilter("ignore", FutureWarning)  # torch's, of names that DeepSpeed uses
    answers, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)  # the first rank's console
    if sys.argv[1:] == ["cpu"]:
        prepare_deepspeed("cpu")
    # torch's checkpointing and optimizers, and stage 3, load some 75 MB: here once for all ranks.
    importlib.import_module("torch._dynamo")
    for line in sys.stdin:
        job = Job.parse(line)
        for rank in job.ranks:
            _rehearse_apart(job, rank, answers)


def _rehearse_apart(job: Job, rank: int, answers: int) -> None:
    """Rehearse a rank in a fork of this process, which writes its answer to a file descriptor."""
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    child = os.fork()
    if not child:
        try:
            os.write(answers, _rehearse(job, rank, folder).encode() + b"\n")
        except BaseException:  # noqa: BLE001 (this process is a copy, which must not continue)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    shutil.rmtree(folder)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        error = MegabackError(f"rank {rank} ended early; see its messages above")
        os.write(answers, as_json(error).encode() + b"\n")
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        error = MegabackError(
            f"rank {rank} was ended by signal {number}, perhaps for lack of memory; rehearse "
            "fewer layers (`layers`), or use a machine with more memory"
        )
        os.write(answers, as_json(error).encode() + b"\n")


if __name__ == "__main__":
    main()
