"""samples.jsonl: texts that the model wrote at validations, one per line.

As in metrics.jsonl, lines after the resumed step are removed.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import parse_json
from data_pipeline.common.regular_files import UNFIT
from data_pipeline.errors import CheckpointCorruptError
from megaback.faults.run_records import lines_of
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import SAMPLES_NAME


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The samples of a run, oldest first, each with `step`, `given` and `text`.

    A truncated last line is skipped. Raises CheckpointCorruptError for lines that are not of a run,
    FileNotFoundError, and OSError.
    """
    path = run / SAMPLES_NAME
    samples = []
    try:
        for number, text in enumerate(lines_of(path), start=1):
            try:
                line = parse_json(text)
            except ValueError:
                break
            if (
                not isinstance(line, dict)
                or type(line.get("step")) is not int
                or not all(isinstance(line.get(name), str) for name in ("given", "text"))
            ):
                raise ValueError(f"line {number} is not a sample")
            samples.append(line)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNFIT:
            raise
        raise CheckpointCorruptError(
            f"{path} is not of this version of megaback, or damaged ({error}); remove it"
        ) from None
    return samples


class SamplesLog:
    """Writer of samples.jsonl. Only the first rank has one."""

    def __init__(self, run: Path, resumed_step: int, fence: Fence = NO_FENCE) -> None:
        """Remove lines after `resumed_step`. Raises the errors of `read_samples`."""
        self._path, self._fence = run / SAMPLES_NAME, fence
        self.kept: dict[int, list[tuple[str, str]]] = {}
        """Given and whole texts of earlier starts, by step."""
        self._is_begun = os.path.lexists(self._path)
        if self._is_begun:
            earlier = read_samples(run) if resumed_step and self._path.exists() else []
            kept = [line for line in earlier if line["step"] <= resumed_step]
            self._begin(kept)
            for line in kept:
                self.kept.setdefault(line["step"], []).append((line["given"], line["text"]))

    def write(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Append samples: the given text and the whole one."""
        self._fence.check()
        if not self._is_begun:
            self._begin([])
        with self._path.open("a", encoding="utf-8") as file:
            for given, text in texts:
                file.write(json.dumps({"step": step, "given": given, "text": text}) + "\n")

    def _begin(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_text(self._path, text, self._fence.replace)
        self._is_begun = True
