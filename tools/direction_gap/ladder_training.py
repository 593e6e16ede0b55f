"""Training and measurement of a ladder, one rung after the other, resumable after each run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from data_pipeline.errors import CheckpointMissingError, RunMismatchError
from megaback.config import Config
from megaback.data import open_data
from megaback.run_folder import newest_checkpoint_step
from tools.direction_gap.ladder import Rung
from tools.direction_gap.ladder_result import LADDER_NAME, Point, is_ladder, read_ladder
from tools.direction_gap.result import Arrow, compare
from tools.direction_gap.runs import DIRECTIONS, TRAINED_SECTIONS, ArrowRun, TrainedPair

Trains = Callable[[tuple[str, ...], Sequence[ArrowRun]], None]
_KEYS_OF_A_RUNG = {
    "model.width",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "training.steps",
    "training.epochs",
    "training.seed",
}


def earlier_points(config: Config) -> dict[str, Point]:
    """Points of the ladder's result by name, from earlier commands with the same config.

    Raises CheckpointCorruptError, and RunMismatchError for another config.
    """
    from megaback.training.start import changes_on_resume

    path = config.run / LADDER_NAME
    if not is_ladder(path):
        return {}
    points, before = read_ladder(path)
    for key, (there, here) in changes_on_resume(before, config).items():
        if key.partition(".")[0] in TRAINED_SECTIONS and key not in _KEYS_OF_A_RUNG:
            raise RunMismatchError(
                f"{path} was measured with {key} = {there}, and the config has {here}; restore the "
                "config, or choose another run"
            )
    return {point.name: point for point in points}


def measured_points(
    rungs: Sequence[Rung],
    train: Trains | None,
    earlier: Mapping[str, Point],
    device: str | None,
    max_documents: int,
    write: Callable[[Config, Arrow], None],
) -> Iterator[Point]:
    """Train each rung's unfinished runs, if `train` is given, and measure its finished pairs.

    A rung whose models are those of an earlier point is not measured again; the result of any other
    is written. Raises CheckpointMissingError if a measured pair would be lost, RunMismatchError,
    and the errors of `TrainedPair.find` and `compare`.
    """
    for rung in rungs:
        if train is not None and rung.runs:
            train(rung.overrides, [run for run in rung.runs if not _is_finished(run, rung)])
        pairs = _finished_pairs(rung)
        if not pairs:
            continue
        models = {pair.seed: pair.models_hash for pair in pairs}
        known = earlier.get(rung.name)
        if known is not None:
            is_of_them = models.items() <= known.models.items()
            lost = known.models.keys() - models.keys()
            if is_of_them and (lost or not rung.runs or known.max_documents == max_documents):
                yield known
                continue
            if lost:
                raise CheckpointMissingError(
                    f"{LADDER_NAME} has {rung.name} with seeds {_listed(lost)}, whose runs are "
                    f"gone from {rung.config.run}, so that a mean with others cannot be measured; "
                    f"restore them, or move {LADDER_NAME} away"
                )
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


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def _is_finished(run: ArrowRun, rung: Rung) -> bool:
    return newest_checkpoint_step(run.folder) >= (rung.config.training.steps or 0)


def _finished_pairs(rung: Rung) -> list[TrainedPair]:
    """The pairs of which both runs are finished, trained by the rung's config."""
    fingerprint = open_data(rung.config.undivided(), 0, 1).fingerprint
    pairs = []
    runs = sorted([*rung.runs, *rung.earlier_runs], key=lambda run: run.seed)
    for number in range(0, len(runs), len(DIRECTIONS)):
        forward, backward = runs[number : number + len(DIRECTIONS)]
        if _is_finished(forward, rung) and _is_finished(backward, rung):
            pair = TrainedPair.find(forward, backward)
            pair.require_config(rung.config, fingerprint)
            pairs.append(pair)
    return pairs
