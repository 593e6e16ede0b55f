"""Infilling held-out prose: both models, and either of them alone, against the true middle.

    pip install -c constraints.txt -e '.[infill-benchmark]'
    python benchmarks/infill.py --forward DIR --backward DIR --text SHARDS [--windows 200]

TEXT is a folder of shards, of which the val split is read, or a text file. Windows are cut at
random positions: a beginning, a middle and an ending of fixed numbers of tokens. Every method has
the same total number of samples, of 0.5 to 1.5 times the true middle's number of tokens. Similarity
to the true middle is chrF (Popovic, 2015). Intervals contain 95% of 2,000 bootstrap resamples of
the windows.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from sacrebleu.metrics import CHRF
from smoke import Benchmark

from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import TextCodec
from megaback.inference.infill.infiller import Infill, Infiller, InfillOptions, load_infiller
from megaback.inference.sampling import SamplingOptions

RESAMPLES = 2_000
STRANGERS = 15
"""True middles of other windows, among which the true one is ranked."""
BOTH = "both models"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    beginning: str
    middle: str
    ending: str


def documents(path: Path, codec: TextCodec) -> Iterator[list[int]]:
    """Ids of held-out documents, without markers, in reading order."""
    if path.is_file():
        yield codec.encode(path.read_text(encoding="utf-8")).tolist()
        return
    data_set = DataSet.open(path)
    stored = data_set.codec()
    for entry in data_set.manifest.split("val"):
        with data_set.open_shard(entry) as shard:
            for ids in shard.documents():
                yield codec.encode(stored.render(ids)).tolist()


def cut_windows(
    path: Path, codec: TextCodec, count: int, sizes: Sequence[int], seed: int
) -> list[Window]:
    """Windows of the given sizes (beginning, middle, ending) in tokens, cut between characters."""
    generator = np.random.default_rng(seed)
    long_enough = [ids for ids in documents(path, codec) if len(ids) >= sum(sizes)]
    places = np.array([len(ids) - sum(sizes) + 1 for ids in long_enough])
    windows: dict[Window, None] = {}
    edges = np.cumsum([0, *sizes])
    while len(windows) < count:
        ids = long_enough[generator.choice(len(places), p=places / places.sum())]
        start = int(generator.integers(len(ids) - sum(sizes) + 1))
        parts = [codec.render(ids[start + left : start + right]) for left, right in pairwise(edges)]
        if all(parts) and not any("\ufffd" in part for part in parts):
            windows[Window(*parts)] = None
    return list(windows)


def ways(tokens: int, samples: int, seed: int) -> dict[str, InfillOptions]:
    """Method of filling a gap: the models that write and those that score."""

    def way(ahead: int, back: int, weight: float) -> InfillOptions:
        return InfillOptions(
            max_new_tokens=tokens + tokens // 2,
            min_new_tokens=tokens - tokens // 2,
            forward_candidates=ahead,
            backward_candidates=back,
            forward_weight=weight,
            sampling=SamplingOptions(seed=seed),
        )

    return {
        "forward only": way(samples, 0, 1.0),
        "backward only": way(0, samples, 0.0),
        BOTH: way(samples // 2, samples - samples // 2, 0.5),
    }


# Scores per token of each model, and of both.
SCORES: dict[str, Callable[[Infill], float]] = {
    "forward": lambda one: one.forward / one.forward_tokens,
    "backward": lambda one: one.backward / one.backward_tokens,
    "both": lambda one: (one.forward + one.backward) / (one.forward_tokens + one.backward_tokens),
}


class Bootstrap:
    """Means over windows with their intervals, from the same resamples."""

    def __init__(self, num_windows: int) -> None:
        generator = np.random.default_rng(0)
        self._chosen_RW = generator.integers(num_windows, size=(RESAMPLES, num_windows))

    def of(self, values: Sequence[float], digits: int, sign: str = "") -> str:
        values_W: Floats = np.asarray(values, dtype=np.float64)
        low, high = np.quantile(values_W[self._chosen_RW].mean(1), (0.025, 0.975))
        form = f"{sign}.{digits}f"
        return f"{values_W.mean():{form}} ({low:{form}} to {high:{form}})"


@dataclass(frozen=True)
class Measured:
    """A window with its infills."""

    truth: Infill
    strangers: list[Infill]
    found: dict[str, list[Infill]]
    """Infills by method, best first."""

    @property
    def written(self) -> list[Infill]:
        """Infills of all methods, without the true middle."""
        every = {one.middle: one for found in self.found.values() for one in found}
        return [one for one in every.values() if one.middle != self.truth.middle]


def measure(window: Window, others: list[str], options: dict[str, InfillOptions]) -> Measured:
    """Worker in a process that has loaded both models."""
    infiller, gap = _loaded[0], (window.beginning, window.ending)
    truth, *strangers = infiller.score(*gap, [window.middle, *others])
    return Measured(truth, strangers, {way: infiller.fill(*gap, of) for way, of in options.items()})


_loaded: list[Infiller] = []


def load(forward: Path, backward: Path) -> None:
    torch.set_num_threads(1)
    _loaded.append(load_infiller(forward, backward))


def print_ranks(
    title: str,
    pools: Sequence[Sequence[Infill]],
    truths: Sequence[Infill],
    bootstrap: Bootstrap,
) -> None:
    """Rank of the true middle among others; 1 is the best."""
    print(
        f"\nthe true middle among {title}, {np.mean([len(pool) for pool in pools]):.0f} a window\n"
    )
    print("| score | likelier than | first | reciprocal rank |\n|---|---|---|---|")
    for name, score in SCORES.items():
        better = [
            sum(score(one) > score(truth) for one in pool)
            for pool, truth in zip(pools, truths, strict=True)
        ]
        beaten = [100 * (1 - n / len(pool)) for n, pool in zip(better, pools, strict=True)]
        print(
            f"| {name} | {bootstrap.of(beaten, 1)}% "
            f"| {bootstrap.of([100.0 * (n == 0) for n in better], 1)}% "
            f"| {bootstrap.of([1 / (n + 1) for n in better], 3)} |"
        )


def print_found(
    measured: Sequence[Measured], similarities: dict[str, list[float]], bootstrap: Bootstrap
) -> None:
    """Results of each method, and their difference from the results of both models."""
    best = {way: [one.found[way][0] for one in measured] for way in similarities}
    print("\n| | forward, nats/token | backward, nats/token | both | chrF | both models: chrF |")
    print("|---|---|---|---|---|---|")
    for way, found in {**best, "the true middle": [one.truth for one in measured]}.items():
        cells = [bootstrap.of([score(one) for one in found], 3) for score in SCORES.values()]
        if way in similarities:
            cells.append(bootstrap.of(similarities[way], 1))
            pairs = zip(similarities[BOTH], similarities[way], strict=True)
            more = [ours - theirs for ours, theirs in pairs]
            cells.append("" if way == BOTH else bootstrap.of(more, 2, "+"))
        print(f"| {way} | {' | '.join(cells)} |")
    score = SCORES["both"]
    for way in similarities:
        if way != BOTH:
            gains = [score(o) - score(t) for o, t in zip(best[BOTH], best[way], strict=True)]
            print(f"{BOTH} against {way}: {bootstrap.of(gains, 3, '+')} nats/token")
    joined = [100.0 * bool(one.written_forward and one.written_backward) for one in best[BOTH]]
    print(f"written by both: {bootstrap.of(joined, 0)}% of what both models find")


@click.command(
    cls=Benchmark,
    smoke="--forward {forward} --backward {backward} --text {shards} --windows 2"
    " --num-samples 4 --middle-tokens 4 --given-tokens 8 --processes 1",
)
@click.option(
    "--forward",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Forward model folder.",
)
@click.option(
    "--backward",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Backward model folder.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder of shards, or text file.",
)
@click.option("--windows", "count", default=200, show_default=True, help="Number of windows.")
@click.option("--given-tokens", default=32, show_default=True, help="Given tokens on each side.")
@click.option("--middle-tokens", default=16, show_default=True, help="Tokens of the true middle.")
@click.option("--num-samples", default=32, show_default=True, help="Samples per window and method.")
@click.option("--processes", default=2, show_default=True, help="Number of processes.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random number generator.")
@click.option("--examples", type=click.Path(path_type=Path), help="File to write the infills to.")
def main(
    forward: Path,
    backward: Path,
    text: Path,
    count: int,
    given_tokens: int,
    middle_tokens: int,
    num_samples: int,
    processes: int,
    seed: int,
    examples: Path | None,
) -> None:
    """Print three tables."""
    infiller = load_infiller(forward, backward)
    sizes = given_tokens, middle_tokens, given_tokens
    windows = cut_windows(text, infiller.forward.codec, count, sizes, seed)
    others = [
        [windows[(number + place) % count].middle for place in range(1, STRANGERS + 1)]
        for number in range(count)
    ]
    options = ways(middle_tokens, num_samples, seed)
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=load, initargs=(forward, backward)
    ) as pool:
        measured = list(pool.map(measure, windows, others, repeat(options)))
    chrf = CHRF()
    similarities = {
        way: [
            chrf.sentence_score(one.found[way][0].middle, [one.truth.middle]).score
            for one in measured
        ]
        for way in options
    }
    bootstrap = Bootstrap(count)
    truths = [one.truth for one in measured]
    print_ranks(
        "true middles of other windows", [one.strangers for one in measured], truths, bootstrap
    )
    print_ranks("what all ways found", [one.written for one in measured], truths, bootstrap)
    print_found(measured, similarities, bootstrap)
    if examples is not None:
        lines = [
            {**asdict(window), **{way: found[0].middle for way, found in one.found.items()}}
            for window, one in zip(windows, measured, strict=True)
        ]
        examples.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
