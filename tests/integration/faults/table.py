"""Table of injected faults and their expected results. Each entry is one test and one line of
docs/faults.md, which `python -m tests.integration.faults.table > docs/faults.md` writes.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import (
    CheckpointCorruptError,
    DeviceMemoryError,
    MegabackError,
    NonFiniteError,
    PreemptedError,
    PreflightError,
    RankLostError,
    StorageError,
    SupersededError,
)
from megaback.faults.collective_record import describe_hang, read_collectives
from megaback.faults.exit_record import read_history
from tests.helpers.warm_start import COLD_VARIABLE
from tests.integration.faults.actions import (
    end_reader_and_interrupt,
    kill_while_the_other_blocks,
    signal_launcher,
    signal_rank,
    signal_ranks,
    start_again_and_release,
)
from tests.integration.faults.consoles import close_terminal

STEPS = 40
SAVE_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a run of 2 ranks, and the expected result."""

    fault: str
    """Description for docs/faults.md."""
    outcome: str
    code: int | None = None
    """Exit code of the start with the fault; None if it is the start that resumes."""
    output: str = ""
    """Text that the output must contain."""
    inject: dict[str, Any] | None = None
    """Fault for `inject/sitecustomize.py`."""
    act: Callable[["subprocess.Popen[str]", Path], None] | None = None
    """Action on the running launcher."""
    at_step: int = 15
    """Point in time of that action."""
    damage: Callable[[Path], None] | None = None
    """Action on the folder of a run that was stopped after step 30."""
    console: str = "file"
    """Console: a key of `consoles.CONSOLES`."""
    stage: int = 2
    overrides: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """More environment variables of the launcher."""
    recorded: int | None = None
    """Exit code in the run's folder, if it is not that of this start."""
    resumes: bool = True
    """Whether the same command then finishes as an undisturbed run does."""
    check: Callable[[Path], None] | None = None


def make_read_only(_launcher: "subprocess.Popen[str]", run: Path) -> None:
    """Remount the disk of the checkpoints."""
    command = ["mount", "-o", "remount,ro", str(run / "checkpoints")]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        pass  # while a save is in progress


def named_its_collective(run: Path) -> None:
    """Check that the collective in which the first rank waited is recorded."""
    ends = [line for line in read_history(run) if line.get("event") == "exit"]
    (lost,) = (line for line in ends if line["code"] == RankLostError.exit_code)
    assert re.search(r"; rank 0 .* waited in gloo:\w+ of .* \(number \d+ of group ", lost["reason"])
    said = describe_hang(read_collectives(run, lost["start"]))
    assert said is not None
    assert said.endswith("; rank 1 left no record")


def newest(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step-*"))


def truncate(run: Path) -> None:
    """Truncate the newest checkpoint's largest file."""
    path = max(newest(run).iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)


def flip(run: Path) -> None:
    """Change one bit of the newest checkpoint."""
    path = max(newest(run).glob("optimizer-*"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_file(run: Path) -> None:
    """Remove one file of the newest checkpoint."""
    max(newest(run).glob("weights-*")).unlink()


def remove_meta(run: Path) -> None:
    """Make the newest checkpoint incomplete, as a kill in the middle of a save does."""
    (newest(run) / "meta.json").unlink()


def garble_latest(text: str | None) -> Callable[[Path], None]:
    """Change or remove the file that names the newest checkpoint."""

    def damage(run: Path) -> None:
        path = run / "checkpoints" / "latest"
        path.unlink() if text is None else path.write_text(text)

    return damage


def damage_all(run: Path) -> None:
    """Leave no checkpoint that verifies."""
    for path in (run / "checkpoints").glob("step-*/weights-*"):
        os.truncate(path, 100)


def cut_metrics(run: Path) -> None:
    """Cut the last line of the metrics in two."""
    path = run / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)


def at(place: str, do: str, rank: int = 1, call: int = 1, when: str = "before", **more: Any) -> Any:
    """A fault for the injector."""
    return {"at": place, "do": do, "rank": rank, "call": call, "when": when, **more}


def one_step_was_skipped(run: Path) -> None:
    """Check that the step with the non-finite value changed nothing and is counted."""
    from tests.helpers.tiny_run import metrics_of

    skipped = [line["step"] for line in metrics_of(run) if "skipped" in line]
    assert skipped == [5]


def lost_its_console(run: Path) -> None:
    """Check that the run is complete and its history has the reason for lost output."""
    from tests.helpers.tiny_run import metrics_of

    assert metrics_of(run)[-1]["step"] == STEPS
    assert newest(run).name == f"step-{STEPS:08d}"
    lost = [line for line in read_history(run) if line["event"] == "console lost"]
    assert [(line["stream"], line["reason"]) for line in lost] == [
        ("standard output", "Broken pipe")
    ]


SAVER = "megaback.checkpoints.saver:CheckpointSaver"
FORWARD = "megaback.model.gpt:ReverseGPT.forward"
LOST = RankLostError.exit_code
RESUMES = "the same command resumes from the newest checkpoint"
FAULTS = {
    "killed while the other blocks": Fault(
        fault="a rank is killed while the other blocks in a step, as NCCL does then",
        outcome="the other reports which one is dead at its next heartbeat, not after "
        f"hardware.step_timeout_s, and exits; {RESUMES}",
        code=LOST,
        output="is dead",
        inject=at(FORWARD, "sleep", rank=0, call=16, training=True, seconds=600),
        act=kill_while_the_other_blocks,
        at_step=5,
        overrides=("hardware.step_timeout_s=600",),
        stage=1,
    ),
    "killed inside a save": Fault(
        fault="a rank is killed while it writes its part of a checkpoint",
        outcome="the same; the checkpoint is incomplete and never used",
        code=LOST,
        output="is dead",
        inject=at("megaback.checkpoints.safetensors_file:write_tensors", "kill", call=3),
        stage=3,
    ),
    "killed completing a save": Fault(
        fault="the first rank is killed after all parts are written, before meta.json",
        outcome="the same",
        code=LOST,
        output="rank 0",
        inject=at(f"{SAVER}._complete", "kill", rank=0, call=2),
    ),
    "killed after a save": Fault(
        fault="a rank is killed just after a checkpoint is complete",
        outcome=f"the other rank reports which one is dead and exits; {RESUMES}, which is that one",
        code=LOST,
        output="is dead",
        inject=at(f"{SAVER}.finish", "kill", call=4, when="after"),
    ),
    "aborted in validation": Fault(
        fault="a rank aborts (SIGABRT), as torch and CUDA do, while the val set is measured",
        outcome=f"the other rank reports which one is dead and exits; {RESUMES}",
        code=LOST,
        output="is dead",
        inject=at("megaback.training.validation:to_device", "abort", call=3),
    ),
    "all ranks killed": Fault(
        fault="all ranks are killed at once, as by the OOM killer",
        outcome=f"`megaback train` reports it, with the step and phase of the ranks; {RESUMES}",
        code=LOST,
        output="is dead; its last heartbeat was at step",
        act=signal_ranks(signal.SIGKILL),
        stage=1,
    ),
    "launcher killed": Fault(
        fault="`megaback train` itself is killed",
        outcome=f"the ranks notice, save and exit; {RESUMES}",
        code=-signal.SIGKILL,
        output="asked to stop",
        act=signal_launcher(signal.SIGKILL),
    ),
    "SIGTERM to one rank": Fault(
        fault="one rank gets SIGTERM",
        outcome="all ranks save at the next step and exit with the code that means requeue",
        code=PreemptedError.exit_code,
        output="asked to stop",
        act=signal_rank(signal.SIGTERM, 1),
        stage=0,
    ),
    "SIGTERM to all": Fault(
        fault="all ranks get SIGTERM",
        outcome="the same",
        code=PreemptedError.exit_code,
        output="asked to stop",
        act=signal_ranks(signal.SIGTERM),
        stage=3,
    ),
    "Ctrl-C in a pipe": Fault(
        fault="`megaback train` in a pipe gets Ctrl-C, which ends the reader (`tee log`) too",
        outcome="the same",
        code=PreemptedError.exit_code,
        output="asked to stop",
        act=end_reader_and_interrupt,
        console="pipe",
    ),
    "closed terminal": Fault(
        fault="the terminal of `megaback train` is closed (SIGHUP), without `nohup`",
        outcome="the same; exit.json has the reason",
        code=PreemptedError.exit_code,
        act=close_terminal,
        console="terminal",
    ),
    "lost console": Fault(
        fault="the reader of the run's output exits (`head`), and the disk of its log is full",
        outcome="training continues to its end without a console; history.jsonl records it",
        console="closed",
        resumes=False,
        check=lost_its_console,
        stage=1,
    ),
    "frozen rank": Fault(
        fault="a rank is frozen (SIGSTOP), or its node is cut off",
        outcome="after hardware.step_timeout_s the other rank names the silent one, and the "
        "collective in which it waited for it, and exits; `megaback train` kills the frozen one",
        code=LOST,
        output="has written no heartbeat",
        act=signal_rank(signal.SIGSTOP, 1),
        check=named_its_collective,
    ),
    "exception in a rank": Fault(
        fault="a rank fails with an unexpected exception",
        outcome=f"its traceback is printed, the reason is in exit.json, the others exit; {RESUMES}",
        code=1,
        output="MemoryError: cannot allocate",
        inject=at("megaback.training.validation:to_device", "raise", call=30),
    ),
    "older start": Fault(
        fault="a requeued job starts again in the run's folder, and a rank of its earlier start, "
        "whose node was cut off from the network, is in the middle of a save",
        outcome="the older start notices the newer one, writes nothing more and exits; the newer "
        "one trains to the end",
        code=SupersededError.exit_code,
        output="a newer start of this run has begun",
        inject=at("megaback.checkpoints.safetensors_file:write_tensors", "wait"),
        act=start_again_and_release,
        # The save notices it, not the watchdog; the checkpoint of that step is kept.
        overrides=("hardware.heartbeat_s=600", "checkpoint.keep_last=9"),
        environment={"SLURM_JOB_ID": "77", COLD_VARIABLE: "1"},  # its environment is read in /proc
        recorded=0,
    ),
    "device out of memory": Fault(
        fault="a device is out of memory (PyTorch's error, raised artificially)",
        outcome="one message names the allocation, the keys of the config that need less, and the "
        f"plan's estimate; a Slurm job is not requeued; {RESUMES}",
        code=DeviceMemoryError.exit_code,
        output="7.81 GiB could not be allocated",
        inject=at("megaback.training.validation:to_device", "run out of memory", call=30),
    ),
    "full disk": Fault(
        fault="the disk is full during a save",
        outcome="all ranks exit with one error message; earlier checkpoints are intact",
        code=StorageError.exit_code,
        output="cannot write the checkpoint",
    ),
    "read-only disk": Fault(
        fault="the disk becomes read-only between saves",
        outcome="the same",
        code=StorageError.exit_code,
        output="Read-only file system",
        act=make_read_only,
    ),
    "slow disk": Fault(
        fault="writing a checkpoint takes as long as several steps",
        outcome="training continues meanwhile",
        inject=at(
            "megaback.checkpoints.safetensors_file:write_tensors", "sleep", call=1, seconds=3
        ),
    ),
    "bad device": Fault(
        fault="a device computes a wrong matrix product before the first step",
        outcome="all ranks exit, and the node is named; "
        "the same command starts the run once the device is correct",
        code=PreflightError.exit_code,
        output="(rank 1): its device computes wrong products",
        inject=at("megaback.faults.node_facts:multiply", "nan", call=1, when="after"),
    ),
    "NaN": Fault(
        fault="one batch gives a non-finite loss",
        outcome="the step is skipped and counted, on all ranks alike",
        inject=at(FORWARD, "nan", call=9, when="after", training=True),
        resumes=False,
        check=one_step_was_skipped,
    ),
    "only NaN": Fault(
        fault="more than guard.max_skipped_steps consecutive batches give a non-finite loss",
        outcome="the run ends; its checkpoints are finite",
        code=NonFiniteError.exit_code,
        output="skipped steps in a row",
        inject=at(
            "megaback.model.gpt:ReverseGPT.forward",
            "nan",
            call=51,
            when="after",
            training=True,
            times=99,
        ),
        overrides=("guard.max_skipped_steps=2",),
    ),
    "truncated file": Fault(
        fault="a file of the newest checkpoint is truncated",
        outcome="the damaged file is named, and the run resumes from the previous checkpoint",
        output="is not the file that was saved; going back",
        damage=truncate,
        stage=3,
    ),
    "flipped bit": Fault(
        fault="a bit of the newest checkpoint is flipped",
        outcome="the same",
        output="is not the file that was saved; going back",
        damage=flip,
        stage=1,
    ),
    "missing file": Fault(
        fault="a file of the newest checkpoint is missing",
        outcome="the same",
        output="is missing; going back",
        damage=remove_file,
    ),
    "incomplete checkpoint": Fault(
        fault="the newest checkpoint has no meta.json",
        outcome="it is ignored; the run resumes from the previous checkpoint",
        damage=remove_meta,
    ),
    "latest missing": Fault(
        fault="`checkpoints/latest` is missing",
        outcome="nothing: it is for people; the folders themselves are read",
        damage=garble_latest(None),
    ),
    "latest empty": Fault(fault="`latest` is empty", outcome="nothing", damage=garble_latest("")),
    "latest pointing nowhere": Fault(
        fault="`latest` names a missing checkpoint",
        outcome="nothing",
        damage=garble_latest("step-99999999\n"),
    ),
    "truncated metrics": Fault(
        fault="the last line of metrics.jsonl is truncated",
        outcome="nothing: the metrics are truncated to the checkpoint in any case",
        damage=cut_metrics,
    ),
    "all checkpoints damaged": Fault(
        fault="no checkpoint verifies",
        outcome="the run exits and names the damaged file; it never starts from step 0 by itself",
        code=CheckpointCorruptError.exit_code,
        output="no other checkpoint",
        damage=damage_all,
        resumes=False,
    ),
    "checkpoints lost": Fault(
        fault="the checkpoints folder is missing, and checkpoint.copy_to has copies",
        outcome="the newest copy that verifies is fetched, and the run resumes from it",
        output="was fetched from",
    ),
}


def as_markdown() -> str:
    """docs/faults.md."""
    classes = {kind.exit_code: kind.__name__ for kind in _all_errors(MegabackError)}
    lines = [
        "# Faults",
        "",
        "Faults that runs survive, and their results. Each line is a test of a real run of two",
        "processes (`tests/integration/faults/`), which also checks that the resumed run ends with",
        "the metrics of an undisturbed run, bit for bit.",
        "",
        "| fault | outcome | exit code |",
        "|---|---|---|",
    ]
    for fault in FAULTS.values():
        code = "" if fault.code is None else str(fault.code)
        if fault.code in classes:
            code = f"{fault.code} `{classes[fault.code]}`"
        elif fault.code is not None and fault.code < 0:
            code = f"of the ranks: {PreemptedError.exit_code} `PreemptedError`"
        lines.append(f"| {fault.fault} | {fault.outcome} | {code} |")
    return "\n".join(lines) + "\n"


def _all_errors(kind: type[MegabackError]) -> list[type[MegabackError]]:
    return [kind, *(error for child in kind.__subclasses__() for error in _all_errors(child))]


if __name__ == "__main__":
    print(as_markdown(), end="")
