"""The training loop of a rank.

For each step it takes the batch, on which the ranks have agreed (`agreement`), steps the engine,
and validates or saves if due. `setup` prepares the run; `stop_request`, `step_guard` and `watchdog`
handle faults, and `checkpoints.pipeline` saves.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from time import monotonic
from typing import Any, NoReturn

import torch
from torch import Tensor

from data_pipeline.errors import MegabackError, PreemptedError, UserInterruptError
from data_pipeline.loading.directions import Flags
from data_pipeline.loading.rows import Batch
from megaback.checkpoints.pipeline import CheckpointPipeline
from megaback.checkpoints.state import num_updates
from megaback.distributed.device_limits import peak_memory_bytes
from megaback.distributed.engine import set_learning_rates, take_step
from megaback.distributed.gradients import count_micro_batch, reducing_gradients
from megaback.distributed.world import CollectiveExit, Reduction, World, attempt
from megaback.faults.run_lock import release_lock
from megaback.faults.step_guard import StepGuard, guarded_steps, require_updates
from megaback.faults.stop_request import StopRequest
from megaback.model.sending import sent
from megaback.optim.lr_schedule import rate_factor_at
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import RankTimes, StepRecord, by_direction, read_metrics
from megaback.tracking.metrics_log import MetricsLog
from megaback.training.agreement import Agreement, StepAhead
from megaback.training.device_batches import DeviceBatches
from megaback.training.early_stopping import EarlyStopping, mark_best, read_measurements
from megaback.training.forward_time import ForwardTime, with_rank, without_rank
from megaback.training.history_gap import history_gap, other_suites
from megaback.training.measurements import Measurements
from megaback.training.run import Run, batch_arithmetic
from megaback.training.start import describe_changes
from megaback.training.validation import to_device

_COMPILING_STEPS = 2
"""First steps of a run, in which compiling is no news."""


class Trainer:
    """Training loop of a run that is set up."""

    def __init__(self, run: Run, world: World, stop: StopRequest) -> None:
        self._run, self._world, self._stop = run, world, stop
        # All ranks use what the first one has read, so that they decide alike.
        earlier = world.of_first(
            world.run_collectively(_earlier_steps, run, world), list[dict[str, Any]]
        )
        self._guard = StepGuard(run.config.guard, earlier)
        measured = world.of_first(
            world.run_collectively(_measurements, run, world), list[tuple[int, float | None]]
        )
        self._early_stopping = EarlyStopping(run.config.validation.patience, measured)
        self._log = world.run_collectively(_open_log, run, world)
        self._log_error: MegabackError | None = None
        self._checkpoints = CheckpointPipeline(
            run.config.run,
            run.data.codec.model_bytes,
            run.config.checkpoint,
            world,
            run.watchdog,
            self.log,
            run.pinned_steps,
            run.frozen,
        )
        self._ahead = StepAhead(run, world, stop, self._checkpoints)
        send = partial(
            to_device,
            device=world.device,
            context_tokens=run.config.batch.context_tokens,
            is_compiled=run.compiler is not None,
        )
        self._batches = DeviceBatches(world.device, send)
        self._forward_time = (
            ForwardTime(run.engine, world.device) if run.config.logging.rank_times else None
        )
        self._measurements = Measurements(run, world, stop, self._record)
        self._saved_step = run.start_step
        self._val_loss = run.val_loss

    def train(self) -> str:
        """Train to the end of the run; returns the reason why it ended.

        Raises PreemptedError, UserInterruptError or NonFiniteError on all ranks.
        """
        run, total_steps = self._run, self._run.data.total_steps
        measurements, validation = self._measurements, run.config.validation
        if not run.start_step or run.begins_branch:
            self._val_loss = self._validate(run.start_step)
            measurements.measure_suites(run.start_step)
            if run.begins_branch:  # from here on, the branch does not need its trunk
                self._save(run.start_step)
        elif _is_due(validation.suites_interval, run.start_step) and measurements.lacks_suites(
            run.start_step
        ):
            measurements.measure_suites(run.start_step)
        measurements.report_cost(run.start_step)
        run.engine.train()
        self._stop.begin_training()
        started = monotonic()
        run.watchdog.set_phase("reading its rows", run.start_step + 1)
        self._ahead.read(run.start_step)
        self._ahead.begin(self._log_error)
        for step in range(run.start_step, total_steps):
            done = step + 1
            run.watchdog.set_phase("reading its rows", done)
            with self._saving_before_end(step):
                micro_batches, agreed = self._ahead.take()
            # A checkpoint that was begun since then is taken as unfinished.
            is_writing = agreed.is_writing or self._saved_step == step
            self._checkpoints.advance(is_writing=is_writing, is_copying=agreed.is_copying)
            if agreed.must_stop:
                self._stop_after(step)
            self._ahead.read(done)  # after the last step too, where it is not used
            if run.is_excluded(done):
                self._record(lambda log, done=done: log.excluded(done))  # type: ignore[misc]
                self._ahead.take_wait_s()
                self._ahead.begin(self._log_error)
            else:
                self._train_step(step, micro_batches, agreed, started)
            is_end = done == total_steps
            if _is_due(validation.every_steps, done) or is_end:
                with self._saving_before_end(done):
                    self._val_loss = self._validate(done)
                is_end = is_end or self._early_stopping.is_exhausted
            if _is_due(validation.suites_interval, done) or is_end:
                with self._saving_before_end(done):
                    is_measured = measurements.measure_suites(done, is_end=is_end)
                    if not is_measured and not is_end:
                        self._ahead.take()
                if not is_measured and not is_end:
                    self._stop_after(done)
            measurements.report_cost(done)
            is_due = _is_due(run.config.checkpoint.every_steps, done) or done in run.pinned_steps
            if is_due or is_end or self._early_stopping.is_kept(done):
                self._save(done)
            if step == run.start_step:
                run.watchdog.use_step_timeout()
            if is_end:
                break
            started = monotonic()
        self._checkpoints.drain(self._saved_step)
        self._world.stop_if_any(self._log_error)
        updates = self._world.gather(num_updates(run.engine), int)
        branch = run.data.branch
        before = (0, 0) if branch is None else (branch.updates, branch.step)
        require_updates(max(updates) - before[0], run.data.total_steps - before[1])
        stopped = self._early_stopping.is_exhausted
        reason = self._early_stopping.reason if stopped else run.data.mixed.end_reason
        if reason is None:
            return "trained to the end"
        self.log(reason)
        return reason

    def close(self) -> None:
        """Close files, stop threads, and unlock the run's folder."""
        self._run.data.training.close()
        if self._log is not None:
            self._record(MetricsLog.close)
        if self._run.lock is not None:
            release_lock(self._run.lock)

    def _stop_after(self, step: int) -> NoReturn:
        """Save the steps that are done, and raise the same error on all ranks.

        Time may be short, so nothing more is copied.
        """
        if step > self._saved_step:
            self._save(step)
        self._checkpoints.finish_writing(step)
        if self._world.sum(self._stop.is_interrupt)[0] and step == self._run.start_step:
            raise UserInterruptError("interrupted before the first step; there was nothing to save")
        again = "run the same command to resume"
        if self._checkpoints.folder != self._run.config.run:
            argument = shlex.quote(f"run={self._checkpoints.folder}")
            again = f"its folder was moved: run the same command with {argument} to resume"
        raise PreemptedError(f"asked to stop after {step} steps, all of them saved; {again}")

    def _train_step(
        self, step: int, micro_batches: list[Batch], agreed: Agreement, started: float
    ) -> None:
        """Take a step, unless the guard skips it."""
        run, optimizer = self._run, self._run.config.optimizer
        num_graphs = 0 if run.compiler is None else run.compiler.num_graphs
        run.watchdog.set_phase("computing gradients", step + 1)
        is_first = step == run.start_step
        # Nothing is decided by the maxima, so they travel during the whole step. Memory of the
        # first step is allocated by its gradients.
        maxima = None if is_first else self._begin_maxima(is_first)
        self._accumulate_gradients(step, micro_batches, agreed.num_targets)
        maxima = maxima or self._begin_maxima(is_first)
        rate_factor = rate_factor_at(step, run.data.total_steps, optimizer)
        set_learning_rates(run.engine, rate_factor)
        self._ahead.fetch()
        run.watchdog.set_phase("updating", step + 1)

        def loss() -> float:
            return self._ahead.nats() / max(agreed.num_targets, 1)

        gradient_norm, skipped = take_step(
            run.engine, lambda norm: self._guard.verdict(loss(), norm)
        )
        data_wait_s, peak_bytes, *forward = maxima.result()
        step_s = monotonic() - started
        record = StepRecord(
            step=step + 1,
            loss=loss(),
            targets=agreed.num_targets,
            learning_rate=rate_factor * optimizer.learning_rate,
            gradient_norm=gradient_norm,
            step_s=step_s,
            data_wait_share=min(data_wait_s / step_s, 1.0),
            memory_peak_bytes=int(peak_bytes),
            skipped_rows=agreed.skipped_rows,
            skipped=skipped,
            by_direction=self._by_direction(micro_batches, agreed),
            by_data_set=run.data.rows_by_data_set(step, run.config.batch.global_batch_rows),
            rank_times=None if is_first or not forward else _rank_times(*forward),
        )
        self._record(lambda log: log.train(record))
        if run.compiler is not None and step >= run.start_step + _COMPILING_STEPS:
            run.compiler.report_growth(num_graphs, f"step {step + 1:,}")
        self._guard.record(step + 1, record.loss, gradient_norm, skipped)

    def _by_direction(
        self, micro_batches: list[Batch], agreed: Agreement
    ) -> dict[str, dict[str, float | None]] | None:
        """Loss and targets of each direction, of a model of both."""
        if micro_batches[0].is_forward_N is None:
            return None
        return by_direction(
            self._ahead.nats(),
            agreed.num_targets,
            self._ahead.forward_nats(),
            agreed.num_forward_targets,
        )

    def _begin_maxima(self, is_first: bool) -> Reduction:
        """Start to find the longest wait for rows, in seconds, and the peak memory, in bytes.

        With `logging.rank_times`, also the longest and the shortest forward passes of the step
        before, whose work is done.
        """
        values = [self._ahead.take_wait_s(), float(peak_memory_bytes(self._world.device))]
        if self._forward_time is not None:
            forward_s = 0.0 if is_first else self._forward_time.take_s()
            values += [with_rank(forward_s, self._world.rank), -forward_s]
        return self._world.begin_max(*values)

    def _accumulate_gradients(
        self, step: int, micro_batches: list[Batch], num_targets: int
    ) -> None:
        """Run the forward and backward pass of every micro-batch.

        Before the last backward pass, the loss is sent to the other ranks (`StepAhead.nats`).
        """
        run, world = self._run, self._world
        # DeepSpeed averages over ranks and accumulation steps; the loss is the mean over all
        # targets of the step, which are unevenly distributed.
        share = world.size * run.data.accumulation_steps / max(num_targets, 1)
        nats = torch.zeros((), dtype=torch.float64, device=world.device)
        forward_nats: Tensor | None = None
        with reducing_gradients(run.engine):
            for batch, arguments in self._batches.take(micro_batches, self._ahead.micro_batches):
                run.watchdog.set_phase("computing gradients", step + 1)
                with self._forward_time.forward() if self._forward_time else nullcontext():
                    nats_T = run.engine(*arguments)
                    loss = nats_T.sum()
                nats += loss.detach()  # on the device, without a synchronization before the end
                if batch.is_forward_N is not None:
                    part = _forward_nats(nats_T.detach(), batch.is_forward_N)
                    forward_nats = part if forward_nats is None else forward_nats + part
                is_last = batch is micro_batches[-1]
                if is_last:
                    self._ahead.begin(self._log_error, nats, forward_nats)
                run.engine.backward(loss * share)
                if not is_last:
                    count_micro_batch(run.engine)

    def _validate(self, done: int) -> float | None:
        """Loss on the val set in nats per target; None without a val set."""
        loss = self._measurements.validate(done)
        if loss is not None:
            self._early_stopping.measured(done, loss)
        return loss

    def _save(self, done: int) -> None:
        self._world.stop_if_any(self._log_error)  # a checkpoint never lacks the lines before it
        meta = self._run.meta(done, self._val_loss, self._world)
        self._checkpoints.save(self._run.engine, meta, is_best=self._early_stopping.is_kept(done))
        self._saved_step = done

    @contextmanager
    def _saving_before_end(self, done: int) -> Iterator[None]:
        """Save the steps that are done when the ranks exit because data cannot be read.

        Not after an error of the metrics, which lack lines of these steps.
        """
        try:
            yield
        except CollectiveExit:
            if done > self._saved_step and not self._world.sum(self._log_error is not None)[0]:
                with suppress(CollectiveExit):  # the first error is the one that is raised
                    self._save(done)
                    self._checkpoints.finish_writing(done)
                    self.log(f"the {done} steps before this are saved")
            raise

    def log(self, message: str) -> None:
        """Print a line on the console of the first rank."""
        self._record(lambda log: log.message(message))

    def _record(self, write: Callable[[MetricsLog], None]) -> None:
        """Write to the log on the first rank; an error ends all ranks at the next step."""
        if self._log is not None:
            _, error = attempt(write, self._log)
            self._log_error = self._log_error or error


def _forward_nats(nats_T: Tensor, is_forward_N: Flags) -> Tensor:
    """Sum of the losses in rows that are read forward, on their device."""
    is_forward = sent(torch.from_numpy(is_forward_N), nats_T.device)
    nats_N = nats_T.view(len(is_forward), -1).sum(dim=1, dtype=torch.float64)
    return torch.where(is_forward, nats_N, 0.0).sum()


def _rank_times(slowest: float, negated_fastest_s: float) -> RankTimes:
    duration_s, rank = without_rank(slowest)
    return RankTimes(rank, duration_s, max(duration_s + negated_fastest_s, 0.0))


def _earlier_steps(run: Run, world: World) -> list[dict[str, Any]]:
    """Metrics of earlier steps for the guard's window."""
    folder = run.config.run
    if not (world.is_first and run.start_step and (folder / METRICS_NAME).exists()):
        return []
    return guarded_steps(read_metrics(folder), run.start_step, run.config.guard.window_steps)


def _measurements(run: Run, world: World) -> list[tuple[int, float | None]]:
    """Validations before the resume; also marks the best checkpoint."""
    if not (world.is_first and run.start_step) or run.begins_branch:
        return []
    found = read_measurements(run.config.run, run.start_step) or [(run.start_step, run.val_loss)]
    if run.config.validation.patience is not None:
        mark_best(run.config.run, EarlyStopping(None, found).best_step, run.watchdog.fence)
    return found


def _open_log(run: Run, world: World) -> MetricsLog | None:
    if not world.is_first:
        return None
    config = run.config
    flops_share, fence = run.step_flops_share(world), run.watchdog.fence
    branch = run.data.branch
    facts = (flops_share, world.size, fence, branch)
    log = MetricsLog(config, run.start_step, run.data.total_steps, *facts)
    log.message(batch_arithmetic(run, world))
    if run.begins_branch and branch is not None:
        log.message(f"branch from {branch.description}")
    elif run.start_step:
        log.message(f"resuming from step {run.start_step:,}")
        gap = history_gap(config, run.start_step, run.guarded_since)
        other = None if run.suites is None else other_suites(config, run.suites, run.start_step)
        for message in (gap, other):
            if message is not None:
                log.message(message)
    if (val := run.data.describe_val()) is not None:
        log.message(val)
    for line in run.suites.describe() if run.suites is not None else ():
        log.message(line)
    if run.changes:
        log.message(f"changed on resume: {describe_changes(run.changes)}")
    return log


def _is_due(every_steps: int | None, done: int) -> bool:
    return every_steps is not None and done % every_steps == 0
