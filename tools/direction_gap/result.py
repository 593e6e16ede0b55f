"""Loss gap between the directions, overall and by parts, from pairs of trained models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.output_paths import read_object
from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.errors import CheckpointCorruptError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction
from megaback.config import Config
from megaback.data import open_data
from megaback.scoring.paired_difference import Losses, PairedDifference, standard_error_of_mean
from megaback.shown_config import shown_config
from megaback.tracking.loss_by_context import bucket_name, num_buckets
from tools.direction_gap.runs import DIRECTIONS, TrainedPair

if TYPE_CHECKING:
    from megaback.scoring.directions import DocumentLosses, Window

JSON_NAME = "arrow.json"
_FORMAT_NAME, _FORMAT_VERSION = "megaback-arrow", 1


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """Loss gaps, backward minus forward; all but `seeds` are means over seeds."""

    steps: int
    tokens: int
    """Number of tokens that each model was trained on."""
    whole: PairedDifference
    seeds: dict[int, PairedDifference]
    by_context: dict[str, PairedDifference]
    """Gap by the number of tokens of context of the target."""
    by_part: dict[str, PairedDifference]
    """Gap by the target's place in its document, in percent from its beginning."""
    bits_per_byte: dict[str, float]

    @property
    def seeds_error(self) -> float | None:
        """Standard error of the mean gap over seeds, in nats per token; None for one seed."""
        return standard_error_of_mean([gap.nats for gap in self.seeds.values()])

    def to_json(self, config: Config) -> dict[str, Any]:
        return {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            "steps": self.steps,
            "tokens": self.tokens,
            "whole": gap_json(self.whole),
            "bits_per_byte": self.bits_per_byte,
            "seeds_error": self.seeds_error,
            "seeds": {str(seed): gap_json(gap) for seed, gap in self.seeds.items()},
            "by_context": {name: gap_json(gap) for name, gap in self.by_context.items()},
            "by_part": {name: gap_json(gap) for name, gap in self.by_part.items()},
            "config": shown_config(config),
        }


def gap_json(gap: PairedDifference) -> dict[str, Any]:
    """Fields of a gap in a result file."""
    return {
        "forward": gap.first,
        "backward": gap.second,
        "gap": gap.nats,
        "gap_error": gap.nats_error,
        "percent": gap.percent,
        "percent_error": gap.percent_error,
        "targets": gap.num_targets,
        "documents": gap.num_documents,
    }


def gap_of(fields: dict[str, Any]) -> PairedDifference:
    """The gap that `gap_json` wrote. Raises KeyError, TypeError."""
    return PairedDifference(
        first=fields["forward"],
        second=fields["backward"],
        nats=fields["gap"],
        nats_error=fields["gap_error"],
        percent=fields["percent"],
        percent_error=fields["percent_error"],
        num_targets=fields["targets"],
        num_documents=fields["documents"],
    )


def is_summary(path: Path) -> bool:
    """Whether a file is a result of `megaback arrow`, of any version."""
    return (read_object(path) or {}).get("format") == _FORMAT_NAME


def read_summary(path: Path) -> dict[str, Any]:
    """The main numbers of a result file. Raises CheckpointCorruptError."""
    summary, seeds = _read(path)
    return {**summary, "seeds": len(seeds)}


def measured_seeds(folder: Path) -> list[int]:
    """Seeds of an earlier result in a folder. Raises CheckpointCorruptError."""
    path = folder / JSON_NAME
    return _read(path)[1] if is_summary(path) else []


def _read(path: Path) -> tuple[dict[str, Any], list[int]]:
    try:
        fields = read_json(path)
        if (fields["format"], fields["version"]) != (_FORMAT_NAME, _FORMAT_VERSION):
            raise ValueError("another format or version")
        keys = ("forward", "backward", "gap", "gap_error", "percent", "percent_error", "documents")
        summary = {key: fields["whole"][key] for key in keys}
        more = {key: fields[key] for key in ("seeds_error", "steps", "tokens")}
        return {**summary, **more}, [int(seed) for seed in fields["seeds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"{path} is corrupted, or of another version of megaback ({reason}); move it away, and "
            "write it again by `megaback arrow CONFIG --measure-only`"
        ) from None


def compare(
    config: Config, pairs: Sequence[TrainedPair], device: str | None, max_documents: int
) -> Arrow:
    """Measure pairs of models on at most `max_documents` documents of the val set.

    Raises BackendError, and the errors of shards and checkpoints.
    """
    from megaback.inference.placement import choose_device
    from megaback.scoring.directions import Markers, measure

    on = choose_device(device)
    data = open_data(config.undivided(), 0, 1)
    context_tokens = config.batch.context_tokens
    windows = _windows(data.val_sets, context_tokens, max_documents)
    markers = Markers(data.codec.begin_id, data.codec.end_id)
    num_bytes = data.codec.piece_num_bytes()
    found: dict[Direction, list[DocumentLosses]] = {direction: [] for direction in DIRECTIONS}
    with SafeProgress(console=SafeConsole(stderr=True), transient=True) as progress:
        for pair in pairs:
            for direction, model in pair.models(on):
                bar = progress.add_task(f"seed {pair.seed}, {direction.value}", total=len(windows))
                losses = measure(
                    model,
                    direction,
                    windows,
                    context_tokens,
                    markers,
                    num_bytes,
                    partial(progress.advance, bar),
                )
                found[direction].append(losses)
    steps = pairs[0].meta.step
    tokens = steps * config.batch.global_batch_rows * context_tokens
    seeds = [pair.seed for pair in pairs]
    forward, backward = (found[direction] for direction in DIRECTIONS)
    return _arrow(steps, tokens, seeds, forward, backward, context_tokens)


def _windows(
    data_sets: Sequence[DataSet], context_tokens: int, max_documents: int
) -> "list[Window]":
    """Windows of at most `max_documents` documents, spread evenly over all val sets."""
    from megaback.scoring.directions import documents_of, windows_of

    total = sum(data_set.manifest.total("val")["documents"] for data_set in data_sets)
    chosen = min(total, max_documents)
    documents = chain.from_iterable(documents_of(data_set, "val") for data_set in data_sets)
    windows: list[Window] = []
    for place, ids in enumerate(documents):
        number, following = place * chosen // total, (place + 1) * chosen // total
        if following > number:
            windows += windows_of(number, ids, context_tokens)
    return windows


def _arrow(
    steps: int,
    tokens: int,
    seeds: Sequence[int],
    forward: "Sequence[DocumentLosses]",
    backward: "Sequence[DocumentLosses]",
    context_tokens: int,
) -> Arrow:
    from megaback.scoring.directions import NUM_PARTS

    def gap(of: "Callable[[DocumentLosses], Losses]") -> PairedDifference:
        return PairedDifference.between(
            Losses.mean(map(of, forward)), Losses.mean(map(of, backward))
        )

    first = forward[0]
    contexts = [
        bucket
        for bucket in range(num_buckets(context_tokens))
        if first.at_context(bucket).num_targets
    ]
    parts = [
        part
        for part in range(NUM_PARTS)
        if first.at_part(part).num_targets and backward[0].at_part(part).num_targets
    ]
    percent = 100 // NUM_PARTS
    return Arrow(
        steps=steps,
        tokens=tokens,
        whole=gap(lambda losses: losses.whole),
        seeds={
            seed: PairedDifference.between(of_forward.whole, of_backward.whole)
            for seed, of_forward, of_backward in zip(seeds, forward, backward, strict=True)
        },
        by_context={
            bucket_name(bucket): gap(lambda losses, bucket=bucket: losses.at_context(bucket))  # type: ignore[misc]
            for bucket in contexts
        },
        by_part={
            f"{part * percent}-{(part + 1) * percent}%": gap(
                lambda losses, part=part: losses.at_part(part)  # type: ignore[misc]
            )
            for part in parts
        },
        bits_per_byte={
            direction.value: sum(one.bits_per_byte for one in losses) / len(losses)
            for direction, losses in zip(DIRECTIONS, (forward, backward), strict=True)
        },
    )
