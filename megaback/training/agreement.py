"""Values over all ranks that a step needs, exchanged while the step before it computes.

When step s begins, each rank reads its rows of step s + 1. Before the last backward pass of step s
one sum over the ranks is started: of the loss of step s, and of what is decided before step s + 1.
It is queued in the engine's group ahead of the gradients, so that it has arrived when these have.
Its size does not depend on the number of ranks.
"""

from dataclasses import dataclass
from time import monotonic

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import MegabackError
from data_pipeline.loading.rows import Batch
from megaback.checkpoints.pipeline import CheckpointPipeline
from megaback.distributed.world import Reduction, World, attempt
from megaback.faults.stop_request import StopRequest
from megaback.model.sending import sent
from megaback.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Values over all ranks that are known before a step is taken."""

    num_targets: int
    num_forward_targets: int
    """Targets of rows that a model of both directions reads forward."""
    skipped_rows: int
    must_stop: bool
    is_writing: bool
    """Whether any rank is writing a checkpoint."""
    is_copying: bool
    """Whether any rank is copying a checkpoint."""


class StepAhead:
    """This rank's rows of the next step, and the sum over all ranks that is under way."""

    def __init__(
        self, run: Run, world: World, stop: StopRequest, checkpoints: CheckpointPipeline
    ) -> None:
        self._run, self._world, self._stop = run, world, stop
        self._checkpoints = checkpoints
        self._micro_batches: list[Batch] = []
        self._error: MegabackError | None = None
        self._wait_s = 0.0
        self._sums: Reduction | None = None

    def read(self, step: int) -> None:
        """Read this rank's rows of a step; an error is kept until the step is due."""
        asked = monotonic()
        found, self._error = attempt(self._run.data.batches_at, step)
        self._micro_batches = found or []
        self._wait_s += monotonic() - asked

    @property
    def micro_batches(self) -> list[Batch]:
        """This rank's rows of the next step, as far as they were read."""
        return self._micro_batches

    def take_wait_s(self) -> float:
        """Time that `read` has taken since the last call, in seconds."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def begin(
        self,
        log_error: MegabackError | None,
        nats: Tensor | None = None,
        forward_nats: Tensor | None = None,
    ) -> None:
        """Start the sum. Collective, and returns at once.

        `log_error`: an error of the metrics, which ends all ranks before the next step, as one of
        the rows does. `nats`: sum of the losses of this step's targets on this rank;
        `forward_nats`: of those in rows that a model of both directions reads forward.
        """
        self._error = log_error or self._error
        values = torch.tensor(
            [
                0.0,
                0.0,
                sum(batch.num_targets for batch in self._micro_batches),
                sum(batch.num_forward_targets for batch in self._micro_batches),
                sum(batch.num_skipped_rows for batch in self._micro_batches),
                self._stop.reason is not None,
                self._checkpoints.is_writing,
                self._checkpoints.is_copying,
                self._error is not None,
            ],
            dtype=torch.float64,
        )
        sums = sent(values, self._world.device)
        if nats is not None:
            sums[0] += nats  # on the device: the host does not wait for it
        if forward_nats is not None:
            sums[1] += forward_nats
        group = self._run.engine.seq_data_parallel_group
        self._sums = Reduction(sums, dist.ReduceOp.SUM, group)

    def fetch(self) -> None:
        """Start to copy the sum to the host, which then waits once: for the gradient norm."""
        assert self._sums is not None
        self._sums.fetch()

    def nats(self) -> float:
        """Sum of the losses of the step's targets over all ranks, once it has arrived."""
        return self._arrived()[0]

    def forward_nats(self) -> float:
        """The part of `nats` of rows that a model of both directions reads forward."""
        return self._arrived()[1]

    def take(self) -> tuple[list[Batch], Agreement]:
        """This rank's micro-batches of the next step, and the values over all ranks.

        If a rank cannot read its rows or write its metrics, all ranks exit with its error.
        """
        _, _, targets, forward_targets, skipped_rows, *flags = self._arrived()
        num_stops, num_writing, num_copying, num_errors = flags
        if num_errors:
            self._world.stop_if_any(self._error)
        return self._micro_batches, Agreement(
            num_targets=int(targets),
            num_forward_targets=int(forward_targets),
            skipped_rows=int(skipped_rows),
            must_stop=num_stops > 0,
            is_writing=num_writing > 0,
            is_copying=num_copying > 0,
        )

    def _arrived(self) -> list[float]:
        assert self._sums is not None
        return self._sums.result()
