"""Ranks to rehearse, the config of a rehearsal, and the process that does it. Loads no torch."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

from data_pipeline import errors
from data_pipeline.common.import_path import module_command
from data_pipeline.errors import ConfigError, MegabackError
from megaback.config import ALL_KEPT, Config
from megaback.config_operation import CheckpointSection, LoggingSection
from megaback.config_validation import ValidationSection
from megaback.rehearsal.report import RankFailure, RankReport

Device = Literal["cpu", "cuda", "auto"]
_REPORT = TypeAdapter(RankReport)


@dataclass(frozen=True)
class Job:
    """Ranks of one run, to be rehearsed one after another."""

    config: Config
    ranks: tuple[int, ...]
    world_size: int
    ranks_per_node: int
    skip_arithmetic: bool = False
    """Whether most arithmetic is skipped: `rehearsal.skipped_arithmetic`."""

    @classmethod
    def parse(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(Config.model_validate(fields.pop("config")), **fields)

    def to_json(self) -> str:
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "ranks": self.ranks,
                "world_size": self.world_size,
                "ranks_per_node": self.ranks_per_node,
                "skip_arithmetic": self.skip_arithmetic,
            }
        )


def rehearsal_config(
    config: Config, steps: int, layers: int | None, device: Device = "cpu"
) -> Config:
    """The config of a run that is rehearsed: short, without validation and trackers."""
    model = (
        config.model if layers is None else config.model.model_copy(update={"num_layers": layers})
    )
    # A branch is rehearsed as a new run. Of one with LoRA, the trunk's merged weights are frozen.
    is_branch = config.branch_from is not None and config.finetune.adapters is not None
    base = config.branch_from if is_branch else config.init_from
    hardware = {
        "device": device,
        "attention": config.hardware.attention if device == "cuda" else "auto",
        "preflight": "off",
        "memory_check": "off",
    }
    return config.model_copy(
        update={
            "model": model,
            "init_from": base,
            "branch_from": None,
            "keep": ALL_KEPT,
            "training": config.training.model_copy(
                update={"steps": steps, "epochs": None, "compile": "off"}
            ),
            "hardware": config.hardware.model_copy(update=hardware),
            "validation": ValidationSection(),
            "checkpoint": CheckpointSection(),
            "logging": LoggingSection(tensorboard="off"),
        }
    )


def parse_ranks(text: str | None, world_size: int) -> tuple[int, ...]:
    """Ranks of `0,17,511` or `all`; by default the first and the last. Raises ConfigError."""
    if text is None:
        return tuple(dict.fromkeys((0, world_size - 1)))
    if text == "all":
        return tuple(range(world_size))
    words = [word.strip() for word in text.split(",")]
    ranks = [int(word) for word in words if word.isascii() and word.isdecimal()]
    if len(ranks) < len(words) or max(ranks) >= world_size:
        raise ConfigError(
            f"`ranks` is {text}; give numbers from 0 to {world_size - 1}, separated by commas, or "
            "all"
        )
    return tuple(dict.fromkeys(ranks))


class RehearsalProcess:
    """A process that rehearses jobs, and loads the libraries once for all of them."""

    def __init__(self, device: Device = "cpu") -> None:
        self._device = device

    def __enter__(self) -> "RehearsalProcess":
        with ExitStack() as stack:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True)
            )
            self._process = stack.enter_context(
                subprocess.Popen(
                    [*module_command("megaback.rehearsal.process"), self._device],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "TMPDIR": folder},
                    text=True,
                )
            )
            stack.callback(self._process.terminate)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def rehearse(self, job: Job) -> Iterator[RankReport | RankFailure]:
        """Rehearse a job's ranks in turn. Raises MegabackError if the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{job.to_json()}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _ended() from None
        for rank in job.ranks:
            line = self._process.stdout.readline()
            if not line:
                raise _ended()
            fields = json.loads(line)
            if "error" in fields:
                kind = getattr(errors, fields["error"], MegabackError)
                yield RankFailure(rank, kind(fields["message"]))
            else:
                yield _REPORT.validate_python(fields)


def rehearse(*jobs: Job) -> Iterator[RankReport | RankFailure]:
    """Rehearse the ranks of jobs on one device. Raises MegabackError if their process ends."""
    with RehearsalProcess(jobs[0].config.hardware.device) as process:
        for job in jobs:
            yield from process.rehearse(job)


def _ended() -> MegabackError:
    return MegabackError("the process of the ranks ended early; see its messages above")


def as_json(error: MegabackError) -> str:
    """The error of a rank, in place of its report."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})
