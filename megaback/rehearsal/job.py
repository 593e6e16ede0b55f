"""Ranks to rehearse, the config of a rehearsal, and the process that does it. Loads no torch."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import TypeAdapter

from data_pipeline import errors
from data_pipeline.common.import_path import module_command
from data_pipeline.errors import ConfigError, MegabackError
from megaback.config import CheckpointSection, Config, LoggingSection, ValidationSection
from megaback.rehearsal.report import RankReport

_REPORT = TypeAdapter(RankReport)


@dataclass(frozen=True)
class Job:
    """Ranks of one run, to be rehearsed one after another."""

    config: Config
    ranks: tuple[int, ...]
    world_size: int
    ranks_per_node: int

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
            }
        )


def rehearsal_config(config: Config, steps: int, layers: int | None) -> Config:
    """The config of a run that is rehearsed: short, on a CPU, without validation and trackers."""
    model = (
        config.model if layers is None else config.model.model_copy(update={"num_layers": layers})
    )
    hardware = {
        "device": "cpu",
        "attention": "auto",
        "preflight": "off",
        "memory_check": "off",
    }
    return config.model_copy(
        update={
            "model": model,
            "training": config.training.model_copy(
                update={"steps": steps, "epochs": None, "compile": False}
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


def rehearse(*jobs: Job) -> Iterator[RankReport]:
    """Rehearse the ranks of each job. Raises the MegabackError that a run would end with."""
    num_reports = 0
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            module_command("megaback.rehearsal.process"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": folder},
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.writelines(f"{job.to_json()}\n" for job in jobs)
            process.stdin.close()
            for line in process.stdout:
                fields = json.loads(line)
                if "error" in fields:
                    raise getattr(errors, fields["error"], MegabackError)(fields["message"])
                num_reports += 1
                yield _REPORT.validate_python(fields)
        finally:
            process.terminate()
    if num_reports < sum(len(job.ranks) for job in jobs):
        raise MegabackError("the process of the ranks ended early; see its messages above")


def as_json(error: MegabackError) -> str:
    """The error of a rank, in place of its report."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})
