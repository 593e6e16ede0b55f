"""Results of a rehearsal: plain numbers of one rank, and of all ranks together. Loads no torch."""

from dataclasses import dataclass

from data_pipeline.errors import MegabackError


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind."""

    group: str
    """`engine`: of DeepSpeed and Muon; `node`: those of them among the ranks of one node, where
    others are of all nodes, and of ranks with parts of the same rows; `control`: of messages
    between the ranks, on the CPU."""
    kind: str
    calls: int
    sent_bytes: int
    """Bytes that this rank would send, with ring algorithms."""


@dataclass(frozen=True, kw_only=True)
class FirstBatch:
    """The rank's part of the first step's rows."""

    rows: int
    lanes: int
    read_bytes: int
    """Bytes read by this process to open the data and to decode the rows."""
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Owned:
    """State of this rank, in elements without padding."""

    weights: int
    """Weights that this rank updates."""
    gradients: int
    """Gradients that it holds at the end of a step."""
    optimizer_bytes: int
    matrices: int
    """Matrices that it orthogonalizes: with Muon only."""


@dataclass(frozen=True, kw_only=True)
class Ownership:
    """Parameters over all ranks, from the engine's partitioning."""

    parameters: int
    """Elements of all trained parameters."""
    min_weights: int
    max_weights: int
    """Elements that a rank updates, without padding."""
    matrices: int
    ranks_without_matrices: int
    first_without_matrices: int | None
    """Lowest of these ranks, if there are matrices."""
    problems: tuple[str, ...]
    """Elements that no rank or several ranks own; none at stage 0, where every rank has all."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """Measurements of one rank's rehearsal."""

    rank: int
    device: str
    """`cpu` or `cuda`."""
    first_batch: FirstBatch
    owned: Owned
    ownership: Ownership
    start_s: float
    """Duration of the setup of data, model and engine, in seconds."""
    step_s: float
    """Duration of the last step on this machine, without communication."""
    step_cpu_s: float
    """CPU time of the last step, of all threads."""
    phase_s: dict[str, float]
    """Duration of the last step's phases."""
    memory_start_bytes: int
    """Peak memory before the first step: on a CPU that of the process, less its memory before the
    run, on a GPU that of PyTorch's allocator."""
    memory_training_bytes: int
    """Peak memory of the steps."""
    memory_saving_bytes: int
    """Peak memory of the steps and the checkpoint."""
    traffic: tuple[Traffic, ...]
    """Collectives of the last step; ZeRO stage 3 gathers more in the first."""
    start_traffic: tuple[Traffic, ...]
    """Collectives before the first step."""
    checkpoint: dict[str, int]
    """Bytes of each of the rank's files of a checkpoint."""


@dataclass(frozen=True)
class RankFailure:
    """A rank that failed, and the error that a run would end with."""

    rank: int
    error: MegabackError


@dataclass(frozen=True, kw_only=True)
class RowsCheck:
    """Rows of the first steps over all ranks, from the order."""

    steps: int
    rows_per_step: int
    problems: tuple[str, ...]
