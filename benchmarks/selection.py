"""Data selection by direction, after Yu et al., "Reverse Modeling in Large Language Models" (2025).

    python benchmarks/selection.py --prose "prose/train-*.parquet" --out runs/selection

A third of held-out passages is damaged: sentences shuffled, boilerplate or markup inserted. A
forward and a backward model, trained on other, clean passages, score all by `megaback shards
score`. Printed are the areas under the ROC curve of the quality, of each plain loss and of length,
and the loss on clean passages of models that were trained on the half of the mixture with the best
value and on a random half (`megaback shards select`). The same command resumes.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from controlled.damage import Damage, mixture, passages
from controlled.ranking import auc_interval
from controlled.runner import DIRECTIONS, Folder, config_of, cpu_line
from smoke import Benchmark

from data_pipeline.common.atomic import write_text
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.errors import SourceEmptyError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.text.codec import Direction
from megaback.scoring.directions import Markers, documents_of, measure, windows_of
from megaback.scoring.paired_difference import (
    Losses,
    PairedDifference,
    standard_error_of_mean,
)
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder
from tools.demo import run

_DATA_SEED = 0
_MAX_PASSAGES = 4
"""Maximum number of passages per document."""
_KEEP = 0.5
RANKINGS = {
    "quality": ("forward less backward loss", 1),
    "forward_per_token": ("forward loss", -1),
    "backward_per_token": ("backward loss", -1),
    "tokens": ("length", 1),
}
"""Keys of the scores, their names, and whether a high (1) or a low value is good."""
HALVES: dict[str, tuple[str, ...]] = {"quality": (), "forward_per_token": ("--lowest",)}
"""Keys that halves are selected by, with options of `megaback shards select`."""


def split_passages(prose: str, characters: int, sizes: Sequence[int]) -> list[list[list[str]]]:
    """Sets of passages of these sizes, from different documents. Raises SourceEmptyError."""
    texts = [document.text for piece in list_source(prose).slices for document in read_slice(piece)]
    random.Random(_DATA_SEED).shuffle(texts)
    found, waiting = [], iter(texts)
    for size in sizes:
        chosen: list[list[str]] = []
        while len(chosen) < size:
            if (text := next(waiting, None)) is None:
                raise SourceEmptyError(
                    f"{prose} has fewer than the {sum(sizes):,} passages that are needed; give "
                    "more text, or fewer passages"
                )
            chosen += passages(text, characters, _MAX_PASSAGES)
        found.append(chosen[:size])
    return found


def rows_of(clean: Sequence[Sequence[str]]) -> Iterator[dict[str, str]]:
    return ({"text": " ".join(sentences)} for sentences in clean)


def scored(out: Path, shards: Path, forward: Path, backward: Path) -> tuple[Path, list[dict]]:
    """Scores of the mixture with a random number each, and the records."""
    path, plain = out / "scores.jsonl", out / "plain_scores.jsonl"
    if not path.exists():
        run(
            *("shards", "score", str(shards), "--forward", str(forward)),
            *("--backward", str(backward), "--out", str(plain), "--overwrite"),
        )
        generator = random.Random(_DATA_SEED)
        lines = map(json.loads, plain.read_text(encoding="utf-8").splitlines())
        drawn = ({**line, "random": generator.random()} for line in lines)
        write_text(path, "".join(json.dumps(line) + "\n" for line in drawn))
    return path, list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def kinds_of(shards: Path, kinds: dict[str, str | None]) -> list[str | None]:
    """The damage of each document of shards, by its text; None: clean."""
    data_set = DataSet.open(shards)
    codec, markers = data_set.codec(), Markers(data_set.manifest.begin_id, data_set.manifest.end_id)
    stored = (
        markers.as_read(ids, data_set.manifest.text_format.direction)
        for ids in documents_of(data_set, "train")
    )
    return [kinds[codec.render(ids)] for ids in stored]


def clean_losses(run_folder: Path, shards: Path, direction: Direction) -> dict[str, Any]:
    """Nats and targets of each clean document, by the model of a run."""
    import torch

    data_set = DataSet.open(shards)
    codec = data_set.codec()
    model, description, _ = load_model_folder(
        model_folder(run_folder), torch.device("cpu"), torch.float32
    )
    windows = [
        window
        for number, ids in enumerate(documents_of(data_set, "train"))
        for window in windows_of(number, ids, description.context_tokens)
    ]
    found = measure(
        *(model, direction, windows, description.context_tokens),
        Markers(codec.begin_id, codec.end_id),
        codec.piece_num_bytes(),
        lambda _: None,
    )
    return {"nats": found.whole.nats_N.tolist(), "targets": found.whole.targets_N.tolist()}


def losses_of(result: dict[str, Any]) -> Losses:
    return Losses(np.array(result["nats"]), np.array(result["targets"]))


def auc_table(scores: Sequence[dict[str, Any]], kinds: Sequence[str | None]) -> Iterator[str]:
    """AUC of clean against damaged documents, by damage and ranking, as Markdown."""
    yield f"| damage | documents | {' | '.join(name for name, _ in RANKINGS.values())} |"
    yield f"|---|---|{'---|' * len(RANKINGS)}"
    for damage in (None, *Damage):
        rows = []
        bad = [kind is not None and (damage is None or kind == damage.value) for kind in kinds]
        for key, (_, sign) in RANKINGS.items():
            values = [sign * score[key] for score in scores]
            interval = auc_interval(
                [value for value, kind in zip(values, kinds, strict=True) if kind is None],
                [value for value, is_bad in zip(values, bad, strict=True) if is_bad],
            )
            rows.append(f"{interval.value:.3f} ({interval.between})")
        yield f"| {damage.value if damage else 'all'} | {sum(bad)} | {' | '.join(rows)} |"


def half_table(
    found: dict[str, list[dict[str, Any]]], damaged_share: dict[str, float]
) -> Iterator[str]:
    """Loss on clean documents after training on each half, paired by document and seed."""
    yield "| half of the mixture | damaged | clean loss, nats/token | less the random half's |"
    yield "|---|---|---|---|"
    of_random = [losses_of(one) for one in found["random"]]
    for key, results in found.items():
        losses = [losses_of(one) for one in results]
        per_seed = [
            one.per_token - other.per_token for one, other in zip(losses, of_random, strict=True)
        ]
        over_documents = PairedDifference.between(Losses.mean(of_random), Losses.mean(losses))
        error = standard_error_of_mean(per_seed)
        difference = f"{over_documents.nats:+.4f} ± {over_documents.nats_error or 0:.4f}"
        if error is not None:
            difference += f" (over seeds ± {error:.4f})"
        name = RANKINGS[key][0] if key in RANKINGS else key
        yield (
            f"| {'random' if key == 'random' else f'best by {name}'} "
            f"| {100 * damaged_share[key]:.1f}% | {Losses.mean(losses).per_token:.4f} "
            f"| {'' if key == 'random' else difference} |"
        )


@click.command(
    cls=Benchmark,
    smoke="--prose {text} --out {out} --config {config} --steps 2 --scorer-steps 2 --num-seeds 1"
    " --passages 60 --scorer-passages 30 --clean-passages 9 --vocab-size 600"
    " --passage-characters 400 --half quality",
)
@click.option("--prose", required=True, help="Source of documents.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=config_of("selection"),
    help="Config of the models. Default: controlled/selection.yaml beside this file.",
)
@click.option(
    "--passages",
    "num_mixed",
    type=COUNT.option,
    default=1500,
    show_default=True,
    help="Passages of the mixture, a third of which is damaged.",
)
@click.option(
    "--scorer-passages",
    type=COUNT.option,
    default=2000,
    show_default=True,
    help="Clean passages to train the scoring models on.",
)
@click.option(
    "--clean-passages",
    type=COUNT.option,
    default=200,
    show_default=True,
    help="Clean passages to measure the final models on.",
)
@click.option(
    "--scorer-steps",
    type=COUNT.option,
    default=200,
    show_default=True,
    help="Steps of the scoring models.",
)
@click.option(
    "--steps",
    type=COUNT.option,
    default=80,
    show_default=True,
    help="Steps of the models that are trained on halves.",
)
@click.option(
    "--direction",
    type=click.Choice(DIRECTIONS),
    default="backward",
    show_default=True,
    help="Direction of the models that are trained on halves.",
)
@click.option(
    "--num-seeds", type=COUNT.option, default=3, show_default=True, help="Models per half."
)
@click.option(
    "--half",
    "halves",
    type=click.Choice(list(HALVES)),
    multiple=True,
    default=list(HALVES),
    show_default=True,
    help="Key that a half is selected by, beside the random one. May be repeated.",
)
@click.option(
    "--vocab-size",
    type=COUNT.option,
    default=2048,
    show_default=True,
    help="Size of the tokenizer's vocabulary.",
)
@click.option(
    "--passage-characters",
    "characters",
    type=COUNT.option,
    default=750,
    show_default=True,
    help="Characters of a passage, which ends with the sentence that reaches them.",
)
def main(
    prose: str,
    out: Path,
    config: Path,
    num_mixed: int,
    scorer_passages: int,
    clean_passages: int,
    scorer_steps: int,
    steps: int,
    direction: str,
    num_seeds: int,
    halves: tuple[str, ...],
    vocab_size: int,
    characters: int,
) -> None:
    """Make the texts, train and score, select and train, and print the tables."""
    folder = Folder(out, config, DIRECTIONS, num_seeds, steps)
    sizes = (scorer_passages, clean_passages, num_mixed)
    folder.claim(
        prose=prose,
        sizes=sizes,
        scorer_steps=scorer_steps,
        direction=direction,
        num_seeds=num_seeds,
        vocab_size=vocab_size,
        characters=characters,
    )
    for_scorers, clean, for_mixture = split_passages(prose, characters, sizes)
    mixed = mixture(for_mixture, random.Random(_DATA_SEED))
    texts = {
        "scorers": folder.texts("scorers", rows_of(for_scorers)),
        "clean": folder.texts("clean", rows_of(clean)),
        "mixture": folder.texts("mixture", ({"text": text} for text, _ in mixed)),
    }
    tokenizer = folder.tokenizer(texts["scorers"], vocab_size)
    shards = {name: folder.shards(name, text, tokenizer) for name, text in texts.items()}
    scorers = replace(folder, num_seeds=1, steps=scorer_steps)
    cpu = [
        scorers.results("scorers", shards["scorers"], one, lambda _: {})[0] for one in DIRECTIONS
    ]
    runs = (out / "runs" / f"scorers-{one}-seed0" for one in ("forward", "backward"))
    path, scores = scored(out, shards["mixture"], *runs)
    kinds = kinds_of(shards["mixture"], {text: kind and kind.value for text, kind in mixed})
    click.echo("")
    for line in auc_table(scores, kinds):
        click.echo(line)
    found, damaged_share = {}, {}
    for key, options in {"random": (), **{key: HALVES[key] for key in halves}}.items():
        half = out / "shards" / f"half-{key}"
        if not half.exists():
            run(
                *("shards", "select", str(shards["mixture"]), "--scores", str(path)),
                *("--keep-fraction", str(_KEEP), "--key", key, *options, "--out", str(half)),
            )
        of_half = kinds_of(half, {text: kind and kind.value for text, kind in mixed})
        damaged_share[key] = sum(kind is not None for kind in of_half) / len(of_half)

        def measured(run_folder: Path) -> dict[str, Any]:
            return clean_losses(run_folder, shards["clean"], Direction(direction))

        found[key] = folder.results(f"half-{key}", half, direction, measured)
    click.echo("")
    for line in half_table(found, damaged_share):
        click.echo(line)
    click.echo(f"\n{cpu_line([*cpu, *(one for results in found.values() for one in results)])}.")


if __name__ == "__main__":
    main()
