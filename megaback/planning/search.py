"""Search for the settings with which a run is fastest on a cluster. Loads no torch.

Only settings that change losses by no more than rounding are tried: stage, hierarchy, offload,
reduction and overlap of ZeRO, activation checkpointing, the micro-batch, and the number of ranks
that share rows. The model, the global batch and the precision stay. The order is complete, so that
the same inputs give the same choice.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from data_pipeline.errors import BatchError, ConfigError, NotEnoughMemoryError
from megaback.config import Config
from megaback.planning.data_facts import RunFacts
from megaback.planning.memory import RankMemory, rank_memory
from megaback.planning.plan import NODES, is_allowed
from megaback.planning.run_settings import Cluster, batch_of, row_shares, setting_of, time_of
from megaback.planning.step_time import StepTime

Settings = dict[str, object]
"""Values by key, such as `zero.stage`."""

_TIE = 1.01
"""Ratio of times within which settings count as equally fast."""
_OFFLOADS = ("none", "optimizer", "parameters")
_CHECKPOINTING = ("none", "selective", "block")
_MAX_NODE_DOUBLINGS = 6


@dataclass(frozen=True)
class Candidate:
    """Settings of a run, and what they need."""

    changes: Settings
    """Settings that differ from the given config."""
    config: Config
    memory: RankMemory
    time: StepTime

    @property
    def overrides(self) -> str:
        """The changes as overrides to type."""
        return as_overrides(self.changes)


@dataclass(frozen=True)
class Search:
    """Result of a search."""

    fastest: tuple[Candidate, ...]
    """Fastest candidates that fit, the best first."""
    given: Candidate | None
    """The config as it is, whether it fits or not; None if the ranks do not divide its batch."""
    num_tried: int
    num_fitting: int


def as_overrides(changes: Settings) -> str:
    """Settings as overrides to type."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def search(config: Config, facts: RunFacts, cluster: Cluster, count: int = 5) -> Search:
    """Find the fastest settings that fit.

    Raises BatchError for a batch that the ranks do not divide, ConfigError for a device without
    known rates, and NotEnoughMemoryError, with what is nearest to fitting, if nothing fits.
    """
    given = _given(config, facts, cluster)
    fitting: list[Candidate] = []
    num_tried = 0
    for offload in _OFFLOADS:
        for changes, changed in variants(config, cluster, offload):
            num_tried += 1
            memory = rank_memory(setting_of(changed, facts, cluster))
            if memory.parts.total <= cluster.device.memory_bytes:
                time = _time_of(changed, facts, cluster)
                fitting.append(Candidate(changes, changed, memory, time))
        if fitting:
            break
    if given is not None and all(one.changes for one in fitting):
        is_fitting = given.memory.parts.total <= cluster.device.memory_bytes
        fitting += [given] * is_fitting
    if not fitting:
        raise NotEnoughMemoryError(_nearest(config, facts, cluster))
    fastest_s = min(one.time.total_s for one in fitting)
    fitting.sort(key=lambda one: _order(one, fastest_s))
    return Search(tuple(fitting[:count]), given, num_tried, len(fitting))


def variants(config: Config, cluster: Cluster, offload: str) -> Iterator[tuple[Settings, Config]]:
    """Distinct settings with an offload, as changes of the config, and the config with them.

    Settings without effect keep their value. Raises BatchError.
    """
    for parts in _parts(config, cluster):
        divided = with_settings(config, {"batch.sequence_parallel": parts})
        usual_rows, _ = batch_of(divided, cluster)
        group_rows = config.batch.global_batch_rows // divided.batch.row_groups(cluster.ranks)
        sizes = [rows for rows in range(1, group_rows + 1) if group_rows % rows == 0]
        for stage, checkpointing, rows in product(_stages(config, cluster), _CHECKPOINTING, sizes):
            settings: Settings = {
                "zero.stage": stage,
                "zero.offload": offload,
                "training.activation_checkpointing": checkpointing,
                "batch.sequence_parallel": parts,
            }
            for more in _ways(config, cluster, stage, offload, accumulates=rows < group_rows):
                changes = {
                    key: value
                    for key, value in (settings | more).items()
                    if _value(config, key) != value
                }
                if rows != usual_rows:
                    changes["batch.micro_batch_rows"] = rows
                changed = with_settings(config, changes)
                if is_allowed(changed):
                    yield changes, changed


def _ways(
    config: Config, cluster: Cluster, stage: int, offload: str, *, accumulates: bool
) -> Iterator[Settings]:
    """Ways in which ranks communicate; those without a choice keep their values."""
    choices: dict[str, tuple[object, ...]] = {}
    if cluster.ranks > 1:
        if stage >= 2 and accumulates:
            choices["zero.reduce_once"] = (True, False)
        if stage in (1, 2):
            choices["zero.reduction"] = ("all_reduce", "reduce")
        choices["zero.overlap_communication"] = _overlaps(config, stage)
    if stage == 0 or offload != "none":
        choices["zero.hierarchical"] = (False,)
    elif 1 < cluster.devices_per_node < cluster.ranks:
        choices["zero.hierarchical"] = (False, True)
    known = {key: values for key, values in choices.items() if values}
    for values in product(*known.values()):
        yield dict(zip(known, values, strict=True))


def _parts(config: Config, cluster: Cluster) -> list[int]:
    """Numbers of ranks that can share rows. Raises BatchError if there are none."""
    found = row_shares(config, cluster.ranks, cluster.devices_per_node)
    if not found:
        batch_of(config, cluster)  # raises its error
    return found


def with_settings(config: Config, settings: Settings) -> Config:
    """The config with other values, which are not validated."""
    for key, value in settings.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _stages(config: Config, cluster: Cluster) -> list[int]:
    """Stages that compute alike. In bf16, stage 0 has fp32 weights, and the others bf16 ones."""
    stages = [0, 1, 2, 3]
    if config.training.precision == "bf16":
        stages = [0] if config.zero.stage == 0 else [1, 2, 3]
    if cluster.ranks == 1:  # nothing is sharded
        stages = [stage for stage in stages if stage in (config.zero.stage, 3)]
    return stages


def _overlaps(config: Config, stage: int) -> tuple[bool, ...]:
    """Values of the overlap that are tried; none: the config's.

    It is the default at stage 3. At stages 1 and 2 DeepSpeed's had races, so that only the config
    turns it on.
    """
    given = config.zero.overlap_communication
    if given is None or stage == 0 or (stage < 3 and not given):
        return ()
    return (True, False)


def _given(config: Config, facts: RunFacts, cluster: Cluster) -> Candidate | None:
    """The config as a candidate; None if the ranks do not divide its batch."""
    try:
        memory = rank_memory(setting_of(config, facts, cluster))
    except BatchError:
        return None
    return Candidate({}, config, memory, _time_of(config, facts, cluster))


def _time_of(config: Config, facts: RunFacts, cluster: Cluster) -> StepTime:
    time = time_of(config, facts, cluster)
    if time is None:
        raise ConfigError(
            f"the time of a step on {cluster.device.name} cannot be predicted; choose settings for "
            "a GPU, by `device_name`"
        )
    return time


def _order(candidate: Candidate, fastest_s: float) -> tuple[float, ...]:
    """Order of candidates: time, and among equally fast ones the simpler.

    `fastest_s`: the time of the fastest, to which all within 1% are equal.
    """
    config = candidate.config
    time_s = candidate.time.total_s
    return (
        math.floor(math.log(time_s / fastest_s, _TIE)),
        len(candidate.changes),
        config.batch.sequence_parallel,
        config.zero.stage,
        config.zero.hierarchical,
        _OFFLOADS.index(config.zero.offload),
        _CHECKPOINTING.index(config.training.activation_checkpointing),
        time_s,
        candidate.memory.parts.total,
        config.batch.micro_batch_rows,
        config.zero.reduce_once,
        config.zero.reduction == "reduce",
    )


def _nearest(config: Config, facts: RunFacts, cluster: Cluster) -> str:
    """Message for a run that fits with no settings: the nearest ones, and enough nodes."""
    min_bytes, changes = _smallest(config, facts, cluster)
    message = (
        f"no settings fit {config.run} into the {cluster.device.memory_bytes / 1e9:.1f} GB of each "
        f"of {cluster.shown}; the nearest need {min_bytes / 1e9:.1f} GB: {as_overrides(changes)}"
    )
    for doubling in range(1, _MAX_NODE_DOUBLINGS + 1):
        larger = replace(cluster, nodes=cluster.nodes << doubling)
        try:
            min_bytes, changes = _smallest(config, facts, larger)
        except BatchError:
            break
        if min_bytes <= cluster.device.memory_bytes:
            words = " ".join(filter(None, (f"{NODES} {larger.nodes}", as_overrides(changes))))
            return f"{message}; {words} fits"
    return f"{message}; use a smaller model, or devices with more memory"


def _smallest(config: Config, facts: RunFacts, cluster: Cluster) -> tuple[float, Settings]:
    """Bytes and settings of the variant that needs the least memory."""
    found = (
        (
            rank_memory(setting_of(changed, facts, cluster)).parts.total,
            len(changes),
            as_overrides(changes),
            changes,
        )
        for offload in _OFFLOADS
        for changes, changed in variants(config, cluster, offload)
    )
    min_bytes, _, _, changes = min(found, key=lambda one: one[:3])
    return min_bytes, changes
