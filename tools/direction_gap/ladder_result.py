"""Result of a ladder: the gap of each rung, the fit over all pairs, and what is missing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.output_paths import read_object
from data_pipeline.errors import CheckpointCorruptError, ConfigError
from megaback.config import Config
from megaback.scoring.paired_difference import PairedDifference, standard_error_of_mean
from megaback.shown_config import shown_config
from tools.direction_gap.ladder import Size, parse_budgets, parse_sizes
from tools.direction_gap.ladder_fit import GapFit, fit_gaps
from tools.direction_gap.result import gap_json, gap_of

LADDER_NAME = "ladder.json"
_FORMAT_NAME, _FORMAT_VERSION = "megaback-arrow-ladder", 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """Gap at one model size and one number of training tokens."""

    name: str
    """Name of the rung's folder."""
    size: str
    num_parameters: int
    tokens: int
    """Number of tokens that each model was trained on."""
    max_documents: int
    """Limit on the number of val documents."""
    whole: PairedDifference
    """Gap of the mean losses over seeds."""
    seeds: dict[int, PairedDifference]
    models: dict[int, str]
    """Hash of both checkpoints' files, by seed."""

    @property
    def place(self) -> tuple[Size, int]:
        """Its size, and the number of tokens that was asked for. Raises ConfigError."""
        size, budget = self.name.rsplit("-", 1)
        return parse_sizes(size)[0], parse_budgets(budget)[0]

    @property
    def nats_seeds_error(self) -> float | None:
        """Standard error of the mean gap over seeds, in nats per token; None for one seed."""
        return standard_error_of_mean([gap.nats for gap in self.seeds.values()])

    @property
    def percent_seeds_error(self) -> float | None:
        """The same in percentage points."""
        return standard_error_of_mean([gap.percent for gap in self.seeds.values()])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "parameters": self.num_parameters,
            "tokens": self.tokens,
            **gap_json(self.whole),
            "gap_seeds_error": self.nats_seeds_error,
            "percent_seeds_error": self.percent_seeds_error,
            "seeds": {str(seed): gap_json(gap) for seed, gap in self.seeds.items()},
            "max_documents": self.max_documents,
            "models": {str(seed): model for seed, model in self.models.items()},
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Point":
        """Raises KeyError, TypeError, ValueError."""
        return cls(
            name=fields["name"],
            size=fields["size"],
            num_parameters=fields["parameters"],
            tokens=fields["tokens"],
            max_documents=fields["max_documents"],
            whole=gap_of(fields),
            seeds={int(seed): gap_of(gap) for seed, gap in fields["seeds"].items()},
            models={int(seed): str(model) for seed, model in fields["models"].items()},
        )


@dataclass(frozen=True)
class Ladder:
    """All measured rungs, the cheapest first, also those of earlier commands."""

    points: Sequence[Point]
    missing: Sequence[str]
    """Names of rungs that lack finished runs."""

    def fit(self) -> GapFit:
        return fit_gaps(
            [
                (point.num_parameters, point.tokens, gap.percent)
                for point in self.points
                for gap in point.seeds.values()
            ]
        )

    def to_json(self, config: Config) -> dict[str, Any]:
        return {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            "rungs": [point.to_json() for point in self.points],
            "missing": list(self.missing),
            "fit": asdict(self.fit()),
            "config": shown_config(config),
        }


def is_ladder(path: Path) -> bool:
    """Whether a file is the result of a ladder, of any version."""
    return (read_object(path) or {}).get("format") == _FORMAT_NAME


def read_ladder(path: Path) -> tuple[list[Point], dict[str, Any]]:
    """The points and the config of a result file. Raises CheckpointCorruptError."""
    try:
        fields = read_json(path)
        if (fields["format"], fields["version"]) != (_FORMAT_NAME, _FORMAT_VERSION):
            raise ValueError("another format or version")
        points = [Point.from_json(rung) for rung in fields["rungs"]]
        names = [f"{size}-{budget}" for size, budget in (point.place for point in points)]
        if names != [point.name for point in points]:
            raise ValueError("a rung's name is not WIDTHxLAYERS-TOKENS")
        return points, dict(fields["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"{path} is corrupted, or of another version of megaback ({reason}); move it away, and "
            "write it again by `megaback arrow CONFIG --sizes … --budgets … --measure-only`"
        ) from None
