"""Stages shared by the controlled tasks: texts, tokenizer, shards, runs and stored measurements.

Each stage runs a megaback command, and is skipped once it has finished, so that the same command
resumes. A folder belongs to one set of options.
"""

import json
import resource
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from data_pipeline.common.atomic import write_text
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.errors import ConfigError
from data_pipeline.text.codec import CHAT_PIECES, Direction, Directions
from megaback.config_file import load_config
from megaback.faults.exit_record import read_exit
from tools.demo import run

DIRECTIONS = tuple(direction.value for direction in Direction)
BOTH = Directions.BOTH.value
CHARACTER_PIECES = 256 + 3 + len(CHAT_PIECES) + 1
"""Pieces of every tokenizer: bytes, the unknown piece, markers and a space. With one more for each
character of the text and no others, every character is a token."""
_FRAME_TOKENS = 4096  # few tokens per frame, so that small data is well shuffled


@dataclass(frozen=True)
class Folder:
    """The output folder, and the options of training."""

    out: Path
    config: Path
    directions: tuple[str, ...]
    num_seeds: int
    steps: int | None

    def claim(self, **settings: Any) -> None:
        """Record the options that decide the figures, in a new or empty folder or one of ours.

        Raises ConfigError if others are there, and for a config that cannot be used.
        """
        load_config(self.config)
        settings |= {"config": self.config.read_text(encoding="utf-8"), "steps": self.steps}
        text = json.dumps(settings, indent=2) + "\n"
        path = self.out / "settings.json"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{self.out} has results of other options, listed in {path}; give another --out"
            )
        if not path.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise ConfigError(f"{self.out} has files of something else; give another --out")
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    def texts(self, name: str, rows: Iterable[Mapping[str, str]]) -> Path:
        """A file of JSON lines."""
        path = self.out / "data" / f"{name}.jsonl"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def tokenizer(self, text: Path, vocab_size: int) -> Path:
        """The trained tokenizer.model."""
        model = self.out / "tokenizer" / "tokenizer.model"
        if not model.exists():
            given = ("--source", str(text), "--vocab-size", str(vocab_size))
            run("tokenizer", "train", *given, "--out", str(model.parent))
        return model

    def shards(self, name: str, text: Path, tokenizer: Path) -> Path:
        """Shards of documents, all of them to train on; both directions read them."""
        return self._built(("shards", "build"), name, text, tokenizer)

    def examples(self, name: str, text: Path, tokenizer: Path, direction: str) -> Path:
        """Shards of examples for one direction, with loss on the written part only."""
        context_tokens = load_config(self.config).batch.context_tokens
        given = ("--direction", direction, "--context-tokens", str(context_tokens))
        return self._built(("instruct", "build"), name, text, tokenizer, *given)

    def _built(
        self, command: Sequence[str], name: str, text: Path, tokenizer: Path, *options: str
    ) -> Path:
        path = self.out / "shards" / name
        if not (path / "manifest.json").exists():
            run(
                *(*command, "--source", str(text), "--tokenizer", str(tokenizer), *options),
                *("--val-fraction", "0", "--frame-tokens", str(_FRAME_TOKENS)),
                *("--workers", "1", "--out", str(path)),
            )
        return path

    def results(
        self,
        name: str,
        shards: Path,
        direction: str,
        measure: Callable[[Path], dict[str, Any]],
        written: str = "",
    ) -> list[dict[str, Any]]:
        """Results of `measure` for the run of each seed, with the CPU seconds of training.

        `written`: of a model of both directions, the one that is measured. After an interruption
        they are those of the last start.
        """
        found = []
        for seed in range(self.num_seeds):
            path = self.out / "runs" / f"{name}-{direction}-seed{seed}"
            cpu_s = self._trained(path, shards, direction, seed)
            measured = path.with_name("-".join([path.name, *written.split()]) + ".json")
            if not measured.exists():
                fields = {**measure(path), "cpu_s": cpu_s}
                write_text(measured, json.dumps(fields) + "\n")
            found.append(json.loads(measured.read_text(encoding="utf-8")))
        return found

    @property
    def measured(self) -> list[tuple[str, str, str]]:
        """Parts of models that are measured: direction of training, label, and direction in use."""
        single = [(one, one, one) for one in self.directions if one != BOTH]
        both = [(BOTH, f"{BOTH}, {one}", one) for one in DIRECTIONS if BOTH in self.directions]
        return [*single, *both]

    @property
    def _length(self) -> tuple[str, ...]:
        return () if self.steps is None else (f"training.steps={self.steps}",)

    def _trained(self, path: Path, shards: Path, direction: str, seed: int) -> float | None:
        """Train a run; its CPU seconds, or None if it had been trained before."""
        if (read_exit(path) or {}).get("code") == 0:
            return None
        training = load_config(self.config, self._length).training.model_dump()
        length: tuple[str, ...] = ()
        if direction == BOTH:
            length = tuple(
                f"training.{key}={2 * training[key]}"
                for key in ("steps", "epochs")
                if training[key] is not None
            )
        return self.train(path, shards, f"data.direction={direction}", *length, seed=seed)

    def train(self, path: Path, shards: Path, *overrides: str, seed: int) -> float:
        """Train a run, or resume it; returns its CPU seconds."""
        before = cpu_s_of_children()
        run(
            *("train", str(self.config), f"run={path}", f"data.shards={shards}"),
            *(f"training.seed={seed}", *self._length, *overrides),
        )
        return round(cpu_s_of_children() - before, 1)


def cpu_s_of_children() -> float:
    """CPU time of the processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def config_of(task: str) -> Path:
    """The default config of a task: its model, length of rows and training."""
    return Path(__file__).with_name(f"{task}.yaml")


def folder_options(
    task: str, *, has_both: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of a `Folder`. `has_both`: a model of both directions can be trained."""
    options = (
        click.option(
            "--steps", type=COUNT.option, help="Steps of each run. Default: the config's."
        ),
        click.option(
            "--num-seeds",
            type=COUNT.option,
            default=3,
            show_default=True,
            help="Number of runs of each kind, with the training seeds 0, 1, ...",
        ),
        click.option(
            "--direction",
            "directions",
            type=click.Choice([*DIRECTIONS, BOTH] if has_both else DIRECTIONS),
            multiple=True,
            default=DIRECTIONS,
            show_default=True,
            help="Directions to train. May be repeated."
            + (" both: one model, for the steps of two." if has_both else ""),
        ),
        click.option(
            "--config",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            default=config_of(task),
            help=f"Config of the models. Default: controlled/{task}.yaml beside this file.",
        ),
        click.option(
            "--out", required=True, type=click.Path(path_type=Path), help="Folder to write."
        ),
    )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in options:
            command = option(command)
        return command

    return add


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def cell(values: Sequence[float], digits: int) -> str:
    """Mean over seeds and its standard error, for a table."""
    error = standard_error(values)
    return f"{mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def cpu_line(results: Iterable[dict[str, Any]]) -> str:
    """The CPU time of training, where it is known."""
    known = [result["cpu_s"] for result in results if result["cpu_s"] is not None]
    if not known:
        return "CPU time of training is not known"
    return (
        f"CPU time of training: {sum(known):.0f} s in all, {min(known):.0f} to {max(known):.0f} s "
        f"per run ({len(known)} runs)"
    )
