"""Section `data` of the config. Loads no torch."""

from collections.abc import Mapping
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    field_serializer,
    field_validator,
    model_validator,
)

from data_pipeline.common import number_ranges as ranges
from data_pipeline.common.local_paths import local_path
from data_pipeline.loading.weight_schedule import Weight, moment_without_data, positions_of
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.storage.address_variables import kept
from data_pipeline.text.codec import Directions
from megaback.config_section import Section

Address = Annotated[str, AfterValidator(kept)]
"""A path or URL. Its secrets are in environment variables, so that no copy of a config has them."""


def parse_base(value: Any) -> Any:
    """A local path as Path, and the address of another location as `Address`.

    Raises ConfigError.
    """
    if not isinstance(value, str):
        return value
    local = local_path(value) if is_url(value) else Path(value)
    return kept(value) if local is None else local


Base = Annotated[Path | str, BeforeValidator(parse_base)]
"""Path of a run, checkpoint or model, or URL of copies of checkpoints."""

DEFAULT_FORWARD_SHARE = 0.5


_Position = Annotated[float, ranges.POSITION]
_WeightOverTraining = Annotated[float, ranges.NOT_NEGATIVE]


class WeightedShards(Section):
    path: Address
    """Folder or URL of a data set."""
    weight: Annotated[float, ranges.POSITIVE] | dict[_Position, _WeightOverTraining] = 1.0
    """Weight of this data set: its share of all rows, relative to the other weights. Or weights
    over training, `{0: 3, 0.8: 1}`: from each position on, the first being 0; weight 0: no rows."""
    weight_interpolation: Literal["step", "linear"] = "step"
    """Weight between two positions. step: that of the first; linear: on a line, in 256 steps."""
    max_epochs: Annotated[float, ranges.EPOCHS] | None = None
    """Maximum number of times that this data set is read; fractions are allowed. Default: none."""
    after_max_epochs: Literal["drop", "stop"] = "drop"
    """Action when max_epochs is reached. drop: the other data sets provide its rows, and the run
    ends if there are none; stop: end the run."""

    @field_validator("weight", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _number(value, ranges.POSITIVE)
        weights = {
            _number(position, ranges.POSITION): _number(weight, ranges.NOT_NEGATIVE)
            for position, weight in value.items()
        }
        if 0.0 not in weights:
            raise ValueError("give the weight at position 0, with which training begins")
        if not any(weights.values()):
            raise ValueError("every weight is 0; remove the data set")
        return dict(sorted(weights.items()))

    @property
    def weight_over_training(self) -> Weight:
        """The weight by position."""
        points = self.weight if isinstance(self.weight, dict) else {0.0: self.weight}
        return Weight(tuple(points.items()), self.weight_interpolation == "linear")

    @property
    def shown_weight(self) -> str:
        """The weight in a few characters."""
        if not isinstance(self.weight, dict):
            return f"{self.weight:g}"
        between = "->" if self.weight_interpolation == "linear" else ", then "
        return between.join(f"{weight:g}" for weight in self.weight.values())


def _number(value: Any, allowed: ranges.Range) -> float:
    """A number of YAML, JSON or Python. Raises ValueError."""
    with suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    problem = "not a number" if isinstance(value, bool) else allowed.problem(value)
    if problem is not None:
        raise ValueError(f"{value!r} is {problem}")
    return float(value)


class DataSection(Section):
    shards: tuple[WeightedShards, ...]
    """Folder or URL of a data set that `megaback shards build` wrote, or a list of several, mixed
    by weight."""
    weight_positions: Literal["fraction", "tokens"] = "fraction"
    """Unit of the positions of weights over training. fraction: of the run's steps, which a resume
    cannot change; tokens: since the start, so that the run can be extended."""
    direction: Directions = Directions.BACKWARD
    """Reading direction of the model. Shards of unit `token` serve both directions. both: one model
    of both, each of whose rows is read in one direction."""
    forward_share: Annotated[float, ranges.PART] | None = None
    """Share of the training rows that are read forward, with direction `both`. The val set is read
    in each direction. Default: 0.5."""
    rows: Literal["stream", "documents"] = "stream"
    """Cutting of the train set into rows. stream: every token, in rows that may begin within a
    document; documents: whole documents, packed into rows that begin, in reading order, where
    documents do. What exceeds a row is not read. Part of the data order. The val set is always a
    stream."""
    lanes: Annotated[int, ranges.SIZE] | None = None
    """Number of parallel streams of frames, a divisor of global_batch_rows. Default: the rows of a
    batch, or fewer where the data has too few frames. Part of the data order, which does not depend
    on the number of ranks."""
    window_frames: Annotated[int, ranges.COUNT] = 8
    """Shuffle window of each lane, in frames: rows are shuffled within it."""
    threads: Annotated[int, ranges.MANY_OR_ZERO] = 1
    """Number of threads that decode frames ahead of the training step; 0: on demand. Changes no
    batch."""
    on_bad_frame: Literal["stop", "skip"] = "stop"
    """Action on a frame that cannot be read. stop: end the run; skip: skip, count and log it.
    Not with batch.sequence_parallel."""
    cache: Path | None = None
    """Folder, used for nothing else, that caches frames of remote shards: each is fetched once."""
    cache_gb: Annotated[float, ranges.QUANTITY] = 100.0
    """Maximum size of the cache, in gigabytes (10**9 bytes)."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return ({"path": str(value)},)
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("give a folder or URL, or a list of them with `path` and `weight`")
        return value

    @field_serializer("shards")
    def _as_written(self, shards: tuple[WeightedShards, ...]) -> Any:
        rare = {"weight_interpolation", "max_epochs", "after_max_epochs"}
        fields = [part.model_dump() for part in shards]
        for part in fields:
            for name in rare:
                if part[name] == WeightedShards.model_fields[name].default:
                    del part[name]
        return fields[0]["path"] if len(fields) == 1 and not rare & fields[0].keys() else fields

    @property
    def description(self) -> str:
        """The data sets in one line, without the queries of URLs, which may hold secrets."""
        return ", ".join(
            shown_url(part.path) + (f" x {part.shown_weight}" if len(self.shards) > 1 else "")
            for part in self.shards
        )

    def with_fingerprint(self, fingerprint: str) -> str:
        """The data sets, and the fingerprint of their contents and weights, for records."""
        return f"{self.description}; fingerprint {fingerprint}" if fingerprint else self.description

    @property
    def weights(self) -> tuple[Weight, ...]:
        """Weights of the data sets over training."""
        return tuple(part.weight_over_training for part in self.shards)

    @property
    def is_changing(self) -> bool:
        """Whether shares of data sets change over training, apart from max_epochs."""
        return len(self.shards) > 1 and not all(weight.is_constant for weight in self.weights)

    @property
    def depends_on_length(self) -> bool:
        """Whether the order of the rows depends on the number of steps."""
        return self.is_changing and self.weight_positions == "fraction"

    @property
    def is_both(self) -> bool:
        """Whether the model has both directions."""
        return self.direction is Directions.BOTH

    @property
    def share_read_forward(self) -> float | None:
        """Share of the training rows that a model of both directions reads forward; else None."""
        return (self.forward_share or DEFAULT_FORWARD_SHARE) if self.is_both else None

    @model_validator(mode="after")
    def _share_of_both(self) -> "DataSection":
        if self.forward_share is not None and not self.is_both:
            raise ValueError(
                "forward_share is for models of both directions only; set direction to both or "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _some_weight(self) -> "DataSection":
        is_fraction = self.weight_positions == "fraction"
        positions = positions_of(self.weights)
        if is_fraction and positions[-1] > 1.0:
            raise ValueError(
                f"the position {positions[-1]:g} of a weight is not a fraction of training, from 0 "
                "to 1; for tokens set weight_positions to tokens"
            )
        moment = moment_without_data(self.weights, end=1.0 if is_fraction else inf)
        if moment is not None:
            raise ValueError(f"every weight is 0 from position {moment:g} on; give one above 0")
        return self

    @model_validator(mode="after")
    def _lanes_of_one(self) -> "DataSection":
        if self.lanes is not None and len(self.shards) > 1:
            raise ValueError("lanes can be given for one data set, not for a mixture")
        return self
