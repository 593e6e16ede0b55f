"""Section `data` of the config. Loads no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_serializer, field_validator, model_validator

from data_pipeline.common import number_ranges as ranges
from data_pipeline.redaction import shown_url
from data_pipeline.storage.address_variables import kept
from data_pipeline.text.codec import Directions
from megaback.config_section import Section

Address = Annotated[str, AfterValidator(kept)]
"""A path or URL. Its secrets are in environment variables, so that no copy of a config has them."""

DEFAULT_FORWARD_SHARE = 0.5


class WeightedShards(Section):
    path: Address
    """Folder or URL of a data set."""
    weight: Annotated[float, ranges.POSITIVE] = 1.0
    """Weight of this data set: its share of all rows, relative to the other weights."""


class DataSection(Section):
    shards: tuple[WeightedShards, ...]
    """Folder or URL of a data set that `megaback shards build` wrote, or a list of several, mixed
    by weight."""
    direction: Directions = Directions.BACKWARD
    """Reading direction of the model. Shards of unit `token` serve both directions. both: one model
    of both, each of whose rows is read in one direction."""
    forward_share: Annotated[float, ranges.PART] | None = None
    """Share of the training rows that are read forward, with direction `both`. The val set is read
    in each direction. Default: 0.5."""
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
    """Action on a frame that cannot be read. stop: end the run; skip: skip, count and log it."""
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
        return shards[0].path if len(shards) == 1 else [part.model_dump() for part in shards]

    @property
    def description(self) -> str:
        """The data sets in one line, without the queries of URLs, which may hold secrets."""
        return ", ".join(
            shown_url(part.path) + (f" x {part.weight:g}" if len(self.shards) > 1 else "")
            for part in self.shards
        )

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
    def _lanes_of_one(self) -> "DataSection":
        if self.lanes is not None and len(self.shards) > 1:
            raise ValueError("lanes can be given for one data set, not for a mixture")
        return self
