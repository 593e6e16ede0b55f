"""Plan of a sweep from the words of its command line: folder, runs and record."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import ConfigError
from megaback.config_file import load_config
from tools.sweeps.axes import axes_of, overrides_of, points_of
from tools.sweeps.record import Record, read_record
from tools.sweeps.runs import SweepRun, runs_of


@dataclass(frozen=True)
class SweepPlan:
    """Runs that one command adds to, or resumes in, a folder."""

    out: Path
    runs: list[SweepRun]
    record: Record
    """Record with these runs and those of earlier commands."""

    @classmethod
    def of(
        cls, config: Path, overrides: tuple[str, ...], zipped: tuple[str, ...], out: Path | None
    ) -> "SweepPlan":
        """Validate all runs, and compare them with the sweep in the folder. Writes nothing.

        Raises ConfigError, OutputExistsError, RunMismatchError, and the errors of `load_config`.
        """
        axes, common = axes_of(overrides)
        if not axes:
            load_config(config, common)  # a missing or invalid file is the first problem
            raise ConfigError(
                "no key has a list of values; give one, such as optimizer.learning_rate=1e-3,3e-3"
            )
        keys = [axis.key for axis in axes]
        points = points_of(axes, zipped)
        if out is None:
            run = load_config(config, (*common, *overrides_of(points[0]))).run
            out = run.with_name(f"{run.name}-sweep")
        record = read_record(out)
        if record is not None and {*record.keys} == {*keys}:
            # Names of runs have the order of the first command's keys.
            points = [{key: point[key] for key in record.keys} for point in points]
        runs = runs_of(config, common, points, out)
        if record is None:
            return cls(out, runs, Record.of(runs, keys))
        record.require_same(out, config, common, keys)
        return cls(out, runs, record.with_runs(runs))
