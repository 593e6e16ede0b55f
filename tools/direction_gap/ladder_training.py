"""Training and measurement of a ladder, one rung after the other, resumable after each run."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import CheckpointCorruptError
from megaback.config import Config
from megaback.data import open_data
from megaback.run_folder import newest_checkpoint_step
from tools.direction_gap.ladder import Rung
from tools.direction_gap.ladder_result import LADDER_NAME, Point, is_ladder, read_points
from tools.direction_gap.result import Arrow, compare
from tools.direction_gap.runs import DIRECTIONS, ArrowRun, TrainedPair

Trains = Callable[[tuple[str, ...], Sequence[ArrowRun]], None]


def earlier_points(run: Path) -> dict[str, Point]:
    """Points of the ladder's result by name, from an earlier run of the same command."""
    path = run / LADDER_NAME
    try:
        return {point.name: point for point in read_points(path)} if is_ladder(path) else {}
    except CheckpointCorruptError:
        return {}  # measured again


def measured_points(
    rungs: Sequence[Rung],
    train: Trains | None,
    earlier: dict[str, Point],
    device: str | None,
    max_documents: int,
    write: Callable[[Config, Arrow], None],
) -> Iterator[Point]:
    """Train each rung's unfinished runs, if `train` is given, and measure its finished pairs.

    A rung whose models are those of an earlier point is not measured again; the result of any other
    is written. Raises RunMismatchError, and the errors of `TrainedPair.find` and `compare`.
    """
    for rung in rungs:
        if train is not None:
            train(rung.overrides, [run for run in rung.runs if not _is_finished(run, rung)])
        pairs = _finished_pairs(rung)
        if not pairs:
            continue
        models = {pair.seed: pair.models_hash for pair in pairs}
        known = earlier.get(rung.name)
        if known is not None and (known.models, known.max_documents) == (models, max_documents):
            yield known
            continue
        arrow = compare(rung.config, pairs, device, max_documents)
        write(rung.config, arrow)
        yield Point(
            name=rung.name,
            size=str(rung.size),
            num_parameters=rung.num_parameters,
            tokens=arrow.tokens,
            max_documents=max_documents,
            whole=arrow.whole,
            seeds=arrow.seeds,
            models=models,
        )


def _is_finished(run: ArrowRun, rung: Rung) -> bool:
    return newest_checkpoint_step(run.folder) >= (rung.config.training.steps or 0)


def _finished_pairs(rung: Rung) -> list[TrainedPair]:
    """The pairs of which both runs are finished, trained by the rung's config."""
    fingerprint = open_data(rung.config.undivided(), 0, 1).fingerprint
    pairs = []
    for number in range(0, len(rung.runs), len(DIRECTIONS)):
        forward, backward = rung.runs[number : number + len(DIRECTIONS)]
        if _is_finished(forward, rung) and _is_finished(backward, rung):
            pair = TrainedPair.find(forward, backward)
            pair.require_config(rung.config, fingerprint)
            pairs.append(pair)
    return pairs
