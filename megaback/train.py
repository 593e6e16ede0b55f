"""What a rank runs: `python -m megaback.train CONFIG`, under the deepspeed command, srun or alone.

The loop takes the batch of a step, agrees with the other ranks that all is well, steps the engine,
and now and then measures or saves. Setup is in `preparation`, faults in the modules that they
concern.
"""

import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

import click
import torch

from data_pipeline.command import Command
from data_pipeline.errors import MegabackError, NonFiniteError, PreemptedError
from data_pipeline.rows import Batch
from megaback.checkpoint import save_checkpoint
from megaback.config import Config, load_config
from megaback.distributed import World, attempt, end_world, one_voice, start_world
from megaback.engine import set_learning_rates, take_step
from megaback.evaluation import ValidationResult, evaluate, to_device
from megaback.metrics import MetricsLog, StepRecord
from megaback.preparation import Run, batch_arithmetic, prepare_run
from megaback.schedule import rate_factor_at


class StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT; looked at between steps.

    A second SIGINT, which only a person sends, ends this rank at once and saves nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == self.signal_number == signal.SIGINT:
            os._exit(128 + number)
        self.signal_number = number


def train(config: Config, world: World, stop: StopRequest) -> None:
    """Train to the end of the run, or until a signal. Raises PreemptedError or NonFiniteError."""
    run = prepare_run(config, world)
    log = world.together(_open_log, run, world)
    try:
        _train_steps(run, world, stop, log)
    finally:
        run.data.training.close()
        if log is not None:
            log.close()


def _train_steps(run: Run, world: World, stop: StopRequest, log: MetricsLog | None) -> None:
    config, engine, total_steps = run.config, run.engine, run.data.total_steps
    val_loss = run.val_loss if run.start_step else _validate(run, world, log, 0)
    saved_step = run.start_step
    engine.train()
    for step in range(run.start_step, total_steps):
        started = time.monotonic()
        micro_batches, counts, must_stop = _agree_on_step(run, world, stop, step)
        num_targets, skipped_rows = counts
        if must_stop:
            if step > saved_step:
                _save(run, world, step, val_loss)
            raise PreemptedError(
                f"asked to stop after {step} steps, all of them saved; "
                "run the same command to go on"
            )
        loss = _accumulate_gradients(run, world, micro_batches, num_targets)
        _require_finite("loss", loss, step)
        rate_factor = rate_factor_at(step, total_steps, config.optimizer)
        set_learning_rates(engine, rate_factor)
        gradient_norm = take_step(engine)
        _require_finite("gradient norm", gradient_norm, step)
        done = step + 1
        if log is not None:
            seconds = time.monotonic() - started
            rate = rate_factor * config.optimizer.learning_rate
            record = StepRecord(done, loss, num_targets, rate, gradient_norm, seconds, skipped_rows)
            log.train(record)
        if _is_due(config.validation.every_steps, done) or done == total_steps:
            val_loss = _validate(run, world, log, done)
        if _is_due(config.checkpoint.every_steps, done) or done == total_steps:
            _save(run, world, done, val_loss)
            saved_step = done


def _agree_on_step(
    run: Run, world: World, stop: StopRequest, step: int
) -> tuple[list[Batch], tuple[int, int], bool]:
    """This rank's micro-batches, all ranks' targets and skipped rows, and whether to stop.

    If any rank cannot read its rows, all of them end here, with its message.
    """
    found, error = attempt(run.data.training.at, step)
    micro_batches = found or []
    num_targets, skipped_rows, num_stops, num_errors = world.sum(
        sum(batch.num_targets for batch in micro_batches),
        sum(batch.num_skipped_rows for batch in micro_batches),
        stop.signal_number is not None,
        error is not None,
    )
    if num_errors:
        world.stop_if_any(error)
    return micro_batches, (int(num_targets), int(skipped_rows)), num_stops > 0


def _accumulate_gradients(
    run: Run, world: World, micro_batches: list[Batch], num_targets: int
) -> float:
    """Forward and backward through every micro-batch; the loss over all ranks, in nats a target."""
    # DeepSpeed averages over ranks and accumulation; what is wanted is the mean over all targets
    # of the step, wherever they lie.
    share = world.size * run.data.accumulation_steps / max(num_targets, 1)
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in micro_batches:
        loss = run.engine(*to_device(batch, world.device))
        run.engine.backward(loss * share)
        nats += loss.detach()  # on the device: nothing waits for it until the step's end
        if batch is not micro_batches[-1]:
            run.engine.step()  # counts the micro-batch; changes nothing before the last one
    (total_nats,) = world.sum(float(nats))
    return total_nats / max(num_targets, 1)


def _open_log(run: Run, world: World) -> MetricsLog | None:
    if not world.is_first:
        return None
    config = run.config
    log = MetricsLog(config, run.start_step, run.data.total_steps, run.step_flops_share(world))
    log.say(batch_arithmetic(run, world))
    if run.start_step:
        log.say(f"going on from step {run.start_step:,}")
    if run.start_step >= run.data.total_steps:
        log.say("nothing is left to do; raise training.steps to train on")
    return log


def _validate(run: Run, world: World, log: MetricsLog | None, done: int) -> float | None:
    if not run.data.has_val:
        return None
    batches = run.data.validation(world.rank, world.size)
    result: ValidationResult = evaluate(
        run.engine, batches, run.data.codec.piece_num_bytes(), world
    )
    if log is not None:
        log.validation(done, result.loss, result.bits_per_byte, result.num_targets)
    return result.loss


def _save(run: Run, world: World, done: int, val_loss: float | None) -> None:
    save_checkpoint(
        run.engine,
        run.config.run,
        run.meta(done, val_loss, world),
        run.data.codec.model_bytes,
        world,
        run.config.checkpoint.keep_last,
    )


def _is_due(every_steps: int | None, done: int) -> bool:
    return every_steps is not None and done % every_steps == 0


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the {what} of step {step + 1} is {value}; the checkpoints before it are intact: "
            "lower optimizer.learning_rate or look at the data of that step"
        )


@click.command(cls=Command, name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--local_rank", type=int, hidden=True, expose_value=False)  # the deepspeed command's
def main(config: Path, overrides: tuple[str, ...]) -> None:
    """Train as one rank of a run described by CONFIG and key.sub=value OVERRIDES."""
    stop = StopRequest()
    with one_voice():
        settings = load_config(config, overrides)
        world = start_world(settings.hardware.device, settings.hardware.collective_timeout_s)
    try:
        error: MegabackError | None = None
        try:
            train(settings, world, stop)
        except (NonFiniteError, PreemptedError) as shared:
            error = shared  # raised on every rank alike
        world.stop_if_any(error)
    except SystemExit:
        end_world()  # all ranks leave together: left open, its threads may abort the exit
        raise
    end_world()


if __name__ == "__main__":
    main()
