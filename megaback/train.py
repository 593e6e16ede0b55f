"""What a rank runs: `python -m megaback.train CONFIG`, under a launcher, srun or alone.

The loop takes the batch of a step, agrees with the other ranks that all is well, steps the engine,
and now and then measures or saves. Setup is in `setup`, faults in the modules that they
concern: `stop_request`, `step_guard`, `watchdog`, `saver`.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

if __name__ == "__main__":  # before torch is loaded, which takes seconds
    from data_pipeline.common.console import protect_console
    from megaback.faults.stop_request import exit_at_ctrl_c

    exit_at_ctrl_c()
    protect_console()

import click
import torch

from data_pipeline.common.command import WorkCommand
from data_pipeline.common.console import only_comments
from data_pipeline.common.driver_reports import print_exception
from data_pipeline.common.number_ranges import MANY_OR_ZERO
from data_pipeline.errors import (
    LaunchError,
    MegabackError,
    NonFiniteError,
    PreemptedError,
    UserInterruptError,
)
from data_pipeline.loading.rows import Batch
from data_pipeline.redaction import scrub
from megaback.checkpoints.remote_copy import CheckpointCopier
from megaback.checkpoints.saver import CheckpointSaver
from megaback.checkpoints.state import named_state
from megaback.config import Config
from megaback.config_file import load_config
from megaback.distributed.device_limits import peak_memory_bytes
from megaback.distributed.engine import set_learning_rates, take_step
from megaback.distributed.world import (
    CollectiveExit,
    World,
    attempt,
    end_rank,
    is_collective_error,
    only_first_reports,
    start_world,
)
from megaback.faults.step_guard import StepGuard, guarded_steps
from megaback.faults.stop_request import StopRequest, deadline_of
from megaback.faults.watchdog import Watchdog
from megaback.installation import HIDDEN, is_whole
from megaback.optim.lr_schedule import rate_factor_at
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import StepRecord, read_metrics
from megaback.tracking.metrics_log import MetricsLog
from megaback.training.early_stopping import EarlyStopping, mark_best, read_measurements
from megaback.training.history_gap import history_gap
from megaback.training.setup import Run, batch_arithmetic, prepare_run
from megaback.training.start import AlreadyTrained, describe_changes
from megaback.training.validation import evaluate, to_device

_POLL_S = 0.02
_CONSOLE_TIMEOUT_S = 3.0
"""How long a step waits for whoever reads what the run prints, before that is dropped."""


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step before they take it."""

    num_targets: int
    skipped_rows: int
    data_wait_s: float
    """Of the rank that waited longest for its rows."""
    must_stop: bool
    is_writing: bool
    """Whether any rank still writes a checkpoint."""
    is_copying: bool
    """Whether any rank still copies one to the second place."""


class Trainer:
    """The training loop of a run that is ready."""

    def __init__(self, run: Run, world: World, stop: StopRequest) -> None:
        self._run, self._world, self._stop = run, world, stop
        # All ranks decide alike: by what the first one has read.
        earlier = world.of_first(
            world.run_collectively(_earlier_steps, run, world), list[dict[str, Any]]
        )
        self._guard = StepGuard(run.config.guard, earlier)
        measured = world.of_first(
            world.run_collectively(_measurements, run, world), list[tuple[int, float | None]]
        )
        self._early_stopping = EarlyStopping(run.config.validation.patience, measured)
        self._log = world.run_collectively(_open_log, run, world)
        self._folder = run.config.run
        self._log_error: MegabackError | None = None
        self._copier = world.run_collectively(
            CheckpointCopier, run.config.run, run.config.checkpoint, world
        )
        self._saver = CheckpointSaver(
            run.config.run, run.data.codec.model_bytes, run.config.checkpoint, world
        )

    def train(self) -> str:
        """Train to the end of the run, and say why it ended.

        Raises PreemptedError, UserInterruptError or NonFiniteError on all ranks.
        """
        run, total_steps = self._run, self._run.data.total_steps
        val_loss = run.val_loss if run.start_step else self._validate(0)
        saved_step = run.start_step
        run.engine.train()
        self._stop.begin_training()
        for step in range(run.start_step, total_steps):
            started, done = monotonic(), step + 1
            run.watchdog.set_phase("reading its rows", done)
            with self._saving_before_end(step, saved_step, val_loss):
                micro_batches, agreed = self._agree_on_step(step)
            if self._copier.is_open and not agreed.is_copying:
                self._copier.finish(self.log)
            if self._saver.is_open and not agreed.is_writing:
                self._saver.finish()
            if not self._copier.is_open:
                self._copier.begin(self._saver.take_completed())
            if agreed.must_stop:  # the time may be short: nothing is copied any more
                if step > saved_step:
                    self._save(step, val_loss)
                self._finish_save(step)
                raise self._ending(step)
            if run.is_left_out(done):
                self._record(lambda log, done=done: log.left_out(done))  # type: ignore[misc]
            else:
                self._train_step(step, micro_batches, agreed, started)
            is_end = done == total_steps
            if _is_due(run.config.validation.every_steps, done) or is_end:
                with self._saving_before_end(done, saved_step, val_loss):
                    val_loss = self._validate(done)
                is_end = is_end or self._early_stopping.is_exhausted
            is_best = self._early_stopping.is_kept(done)
            if _is_due(run.config.checkpoint.every_steps, done) or is_end or is_best:
                self._save(done, val_loss)
                saved_step = done
            if step == run.start_step:
                run.watchdog.use_step_timeout()
            if is_end:
                break
        self._finish_save(saved_step)
        for _ in range(2):  # what is on its way, then the last one
            self._wait_while(lambda: self._copier.is_copying, "copying a checkpoint", saved_step)
            self._copier.finish(self.log)
            self._copier.begin(self._saver.take_completed())
        self._world.stop_if_any(self._log_error)
        if not self._early_stopping.is_exhausted:
            return "trained to the end"
        self.log(self._early_stopping.reason)
        return self._early_stopping.reason

    def close(self) -> None:
        """Let go of files, threads and the run's folder."""
        self._run.data.training.close()
        if self._log is not None:
            self._record(MetricsLog.close)
        if self._run.lock is not None:
            self._run.lock.close()

    def _agree_on_step(self, step: int) -> tuple[list[Batch], Agreement]:
        """This rank's micro-batches, and what all ranks know.

        If any rank cannot read its rows or write its metrics, all of them end here, with its
        message.
        """
        asked = monotonic()
        found, error = attempt(self._run.data.training.at, step)
        waits_s = self._world.one_hot(monotonic() - asked)
        error = self._log_error or error
        micro_batches = found or []
        targets, skipped_rows, num_stops, num_writing, num_copying, num_errors, *waits_s = (
            self._world.sum(
                sum(batch.num_targets for batch in micro_batches),
                sum(batch.num_skipped_rows for batch in micro_batches),
                self._stop.reason is not None,
                self._saver.is_writing,
                self._copier.is_copying,
                error is not None,
                *waits_s,
            )
        )
        if num_errors:
            self._world.stop_if_any(error)
        return micro_batches, Agreement(
            int(targets),
            int(skipped_rows),
            max(waits_s),
            num_stops > 0,
            num_writing > 0,
            num_copying > 0,
        )

    def _ending(self, step: int) -> MegabackError:
        """Why a run that was asked to stop ends, the same on all ranks."""
        if self._world.sum(self._stop.is_interrupt)[0] and step == self._run.start_step:
            return UserInterruptError(
                "interrupted before the first step; nothing was there to save"
            )
        again = "run the same command to go on"
        if self._folder != self._run.config.run:
            argument = shlex.quote(f"run={self._folder}")
            again = f"its folder was moved: run the same command with {argument} to go on"
        return PreemptedError(f"asked to stop after {step} steps, all of them saved; {again}")

    def _train_step(
        self, step: int, micro_batches: list[Batch], agreed: Agreement, started: float
    ) -> None:
        """Take a step, unless its numbers are bad."""
        run, optimizer = self._run, self._run.config.optimizer
        loss, peak_bytes = self._accumulate_gradients(step, micro_batches, agreed.num_targets)
        rate_factor = rate_factor_at(step, run.data.total_steps, optimizer)
        set_learning_rates(run.engine, rate_factor)
        run.watchdog.set_phase("updating", step + 1)
        gradient_norm, skipped = take_step(run.engine, lambda norm: self._guard.verdict(loss, norm))
        step_s = monotonic() - started
        record = StepRecord(
            step + 1,
            loss,
            agreed.num_targets,
            rate_factor * optimizer.learning_rate,
            gradient_norm,
            step_s,
            min(agreed.data_wait_s / step_s, 1.0),
            peak_bytes,
            agreed.skipped_rows,
            skipped,
        )
        self._record(lambda log: log.train(record))
        self._guard.record(step + 1, loss, gradient_norm, skipped)

    def _accumulate_gradients(
        self, step: int, micro_batches: list[Batch], num_targets: int
    ) -> tuple[float, int]:
        """Forward and backward through every micro-batch.

        Returns the loss of all ranks in nats a target, and the peak memory of the rank with most.
        """
        run, world = self._run, self._world
        # DeepSpeed averages over ranks and accumulation; what is wanted is the mean over all
        # targets of the step, wherever they lie.
        share = world.size * run.data.accumulation_steps / max(num_targets, 1)
        nats = torch.zeros((), dtype=torch.float64, device=world.device)
        for batch in micro_batches:
            run.watchdog.set_phase("computing gradients", step + 1)
            loss = run.engine(*to_device(batch, world.device)).sum()
            run.engine.backward(loss * share)
            nats += loss.detach()  # on the device: nothing waits for it until the step's end
            if batch is not micro_batches[-1]:
                run.engine.step()  # counts the micro-batch; changes nothing before the last one
        nats_of_all, *peaks = world.sum(
            float(nats), *world.one_hot(peak_memory_bytes(world.device))
        )
        return nats_of_all / max(num_targets, 1), int(max(peaks))

    def _validate(self, done: int) -> float | None:
        run, world = self._run, self._world
        if not run.data.has_val:
            return None
        measured = evaluate(
            run.engine,
            run.data.validation(world.rank, world.size),
            run.config.batch.context_tokens,
            run.data.codec.piece_num_bytes(),
            world,
            lambda: run.watchdog.set_phase("validating", done),
        )
        self._record(lambda log: log.validation(done, measured))
        loss = measured.whole.nats_per_token
        self._early_stopping.measured(done, loss)
        return loss

    def _save(self, done: int, val_loss: float | None) -> None:
        run, world = self._run, self._world
        self._finish_save(done)
        run.watchdog.set_phase("saving", done)
        state = named_state(run.engine, world.rank, world.size)
        meta = run.meta(done, val_loss, world)
        folder = world.of_first(world.run_collectively(run.watchdog.folder), Path)
        if folder != self._folder:
            self._folder = folder
            self.log(f"the run's folder is now {folder}: checkpoints go there")
        self._saver.begin(state, meta, folder, is_best=self._early_stopping.is_kept(done))

    @contextmanager
    def _saving_before_end(
        self, done: int, saved_step: int, val_loss: float | None
    ) -> Iterator[None]:
        """Save the steps that are done when the ranks end for data that cannot be read.

        Not after an error of the metrics: they lack lines of these steps.
        """
        try:
            yield
        except CollectiveExit:
            if done > saved_step and not self._world.sum(self._log_error is not None)[0]:
                with suppress(CollectiveExit):  # the first error decides how the run ends
                    self._save(done, val_loss)
                    self._finish_save(done)
                    self.log(f"the {done} steps before this are saved")
            raise

    def _finish_save(self, done: int) -> None:
        """Complete the checkpoint that is open, if there is one."""
        self._wait_while(lambda: self._saver.is_writing, "writing a checkpoint", done)
        self._saver.finish()

    def _wait_while(self, is_busy: Callable[[], bool], phase: str, step: int) -> None:
        """Wait together until no rank is busy, which may take longer than anything else may."""
        while self._world.sum(is_busy())[0]:
            self._run.watchdog.set_phase(phase, step)
            sleep(_POLL_S)

    def log(self, message: str) -> None:
        self._record(lambda log: log.message(message))

    def _record(self, write: Callable[[MetricsLog], None]) -> None:
        """Write to the log where there is one; the ranks hear of an error at their next step."""
        if self._log is not None:
            _, error = attempt(write, self._log)
            self._log_error = self._log_error or error


def _earlier_steps(run: Run, world: World) -> list[dict[str, Any]]:
    """Metrics of the steps that the guard compares with."""
    folder = run.config.run
    if not (world.is_first and run.start_step and (folder / METRICS_NAME).exists()):
        return []
    return guarded_steps(read_metrics(folder), run.start_step, run.config.guard.window_steps)


def _measurements(run: Run, world: World) -> list[tuple[int, float | None]]:
    """The validations before the run went on; the best checkpoint is marked."""
    if not (world.is_first and run.start_step):
        return []
    found = read_measurements(run.config.run, run.start_step) or [(run.start_step, run.val_loss)]
    if run.config.validation.patience is not None:
        mark_best(run.config.run, EarlyStopping(None, found).best_step)
    return found


def _open_log(run: Run, world: World) -> MetricsLog | None:
    if not world.is_first:
        return None
    config = run.config
    log = MetricsLog(
        config, run.start_step, run.data.total_steps, run.step_flops_share(world), world.size
    )
    log.message(batch_arithmetic(run, world))
    if run.start_step:
        log.message(f"going on from step {run.start_step:,}")
        gap = history_gap(config, run.start_step)
        if gap is not None:
            log.message(gap)
    if run.changes:
        log.message(f"changed on resume: {describe_changes(run.changes)}")
    return log


def _is_due(every_steps: int | None, done: int) -> bool:
    return every_steps is not None and done % every_steps == 0


def train_run(
    config: Config, world: World, stop: StopRequest, watchdog: Watchdog, given: Path | None = None
) -> None:
    """Train a run, whose config file was given, to its end. Raises CollectiveExit on all ranks."""
    error: MegabackError | None = None
    reason = ""
    try:
        prepared = prepare_run(config, world, watchdog, given)
        if isinstance(prepared, AlreadyTrained):
            if world.is_first:
                print(prepared.message, flush=True)
            return
        trainer = Trainer(prepared, world, stop)
        try:
            reason = trainer.train()
        finally:
            trainer.close()
    except (NonFiniteError, PreemptedError, UserInterruptError) as shared:
        error = shared  # raised on every rank alike
    world.stop_if_any(error)
    if world.is_first:
        watchdog.record_exit(0, "finished", reason)
    watchdog.mark_exited(reason)


def _train_as_rank(config: Config, world: World, stop: StopRequest, given: Path) -> int:
    """Train, and say in the run's folder how it ended. Returns the exit code."""
    watchdog = Watchdog(config.run, config.hardware, world)
    try:
        train_run(config, world, stop, watchdog, given)
    except CollectiveExit as ending:
        reason = ending.error
        if reason is not None and watchdog.is_open:  # else the record is that of an earlier start
            watchdog.record_exit(reason.exit_code, type(reason).__name__, str(reason))
        watchdog.mark_exited("all ranks ended together")
        return int(ending.code or 0)
    except Exception as fault:  # noqa: BLE001 (what it is, is said)
        # The other ranks cannot be asked; they see that this one has left, and why.
        if is_collective_error(fault):
            os._exit(watchdog.report_lost().exit_code)
        print_exception(type(fault), fault, fault.__traceback__)
        reason_text = scrub(f"{type(fault).__name__}: {' '.join(str(fault).split())}")
        if watchdog.is_open:
            watchdog.record_exit(MegabackError.exit_code, "Exception", reason_text)
        watchdog.mark_exited(reason_text)
        os._exit(MegabackError.exit_code)
    return 0


@click.command(cls=WorkCommand, name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--save-before", hidden=True)
# What the deepspeed command passes.
@click.option("--local_rank", type=MANY_OR_ZERO.option, hidden=True, expose_value=False)
def main(config: Path, overrides: tuple[str, ...], save_before: str | None) -> None:
    """Train as one rank of a run described by CONFIG and key.sub=value OVERRIDES."""
    only_comments(_CONSOLE_TIMEOUT_S)
    with only_first_reports():
        if not is_whole():
            raise LaunchError(HIDDEN)
        stop = StopRequest(deadline_of(save_before))
        settings = load_config(config, overrides)
        world = start_world(settings.hardware.device, settings.hardware.collective_timeout_s)
    end_rank(_train_as_rank(settings, world, stop, config))


if __name__ == "__main__":
    main()
