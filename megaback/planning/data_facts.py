"""Data facts of a run's plan: vocabulary, tokens and document lengths, from manifests or assumed.

Loads no torch and decodes no shard. For local data sets, document lengths are read from the indexes
of some shards; for remote ones, the manifest gives their mean. Assumptions are reported as notes.
"""

from dataclasses import dataclass
from math import ceil

import numpy as np

from data_pipeline.errors import CheckpointMissingError, ConfigError, ShardsMissingError
from data_pipeline.loading.document_index import open_document_index
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.document_lengths import DocumentLengths
from data_pipeline.shards.manifest import Manifest
from megaback.branch_order import require_steps_left, whole_steps
from megaback.branches import BranchPoint, find_branch_point
from megaback.config import Config
from megaback.planning.data_mixture import (
    DataMixture,
    DataUse,
    plan_mixture,
    require_data_to_horizons,
)
from megaback.planning.flops import attended_tokens

DEFAULT_VOCAB_SIZE = 8_888
_MAX_SHARDS = 64
"""Maximum number of shards per data set whose indexes are read, spread evenly."""
_SHARD_BYTES_PER_TOKEN = 1.28
"""Size per token of uint16 ids at zstd level 6: benchmarks/README.md."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run that are not in its config."""

    vocab_size: int
    attended_tokens: float
    """Number of tokens that a token attends to, on average over documents and rows."""
    total_tokens: float | None
    """Number of tokens of all steps; None: the length of the run is unknown."""
    shard_bytes: float | None
    notes: tuple[str, ...]
    """Assumptions that were made."""
    data: tuple[DataUse, ...] = ()
    """Use of each data set; empty if they do not exist yet."""
    end_reason: str | None = None
    """Reason why the run ends before the steps of its config; else None."""


def attended_of(data_set: DataSet, context_tokens: int, *, are_whole: bool = False) -> float:
    """Mean number of tokens that a token of a data set attends to. Raises ShardCorruptError.

    `are_whole`: rows are of whole documents, cut to `context_tokens`.
    """
    manifest = data_set.manifest
    lengths = _lengths(data_set)
    if are_whole:
        lengths = [(min(length, context_tokens), count) for length, count in lengths]
    tokens = sum(length * count for length, count in lengths)
    if manifest.row_tokens is not None or are_whole:  # not cut any further
        return sum(length * count * (length + 1) / 2 for length, count in lengths) / tokens
    attended = (
        length * count * attended_tokens(length, context_tokens) for length, count in lengths
    )
    return sum(attended) / tokens


def _lengths(data_set: DataSet) -> list[tuple[float, int]]:
    """(length in tokens, number of documents) pairs; for a remote data set, one mean length."""
    entries, total = data_set.manifest.split("train"), data_set.manifest.total("train")
    if is_url(data_set.name) or not total["documents"]:
        return [(max(total["tokens"] / max(total["documents"], 1), 1.0), 1)]
    found = []
    for entry in entries[:: ceil(len(entries) / _MAX_SHARDS)]:
        with data_set.open_shard(entry) as reader:
            found.append(DocumentLengths.of(reader.text_tokens()))
    joined = DocumentLengths.joined(found)
    pairs = zip(joined.lengths.tolist(), joined.documents.tolist(), strict=True)
    return [(float(length), count) for length, count in pairs if length]


def run_facts(config: Config, vocab_size: int | None, total_tokens: float | None) -> RunFacts:
    """Read the manifests; the arguments are used for data sets that do not exist yet.

    Raises ConfigError if the arguments contradict them or `max_epochs` ends the data before the
    last horizon, and the errors of damaged data sets.
    """
    batch, parts = config.batch, config.data.shards
    step_tokens = batch.global_batch_rows * batch.context_tokens
    steps = config.training.steps
    notes: list[str] = []
    mixed: DataMixture | None = None
    branch = _branch_of(config, notes)
    first = read_steps = 0
    if branch is not None:
        first, read_steps = branch.step, whole_steps(branch, batch) - branch.step
        require_steps_left(branch, config.training, steps)
    are_whole = config.data.rows == "documents"
    try:
        data_sets = [DataSet.open(part.path) for part in parts]
    except ShardsMissingError:
        data_sets = []
    if data_sets:
        manifests = [data_set.manifest for data_set in data_sets]
        training = config.training
        if total_tokens is not None:
            length = {"steps": first + ceil(total_tokens / step_tokens), "epochs": None}
            training = training.model_copy(update=length)
        rows = [_rows_per_epoch(manifest, batch.context_tokens) for manifest in manifests]
        if are_whole:
            indexes = [
                open_document_index(data_set, "train", batch.context_tokens)
                for data_set in data_sets
            ]
            rows = [index.rows_per_epoch for index in indexes]
            notes += [
                f"whole documents of {data_set.name}: {index.totals.describe()}"
                for data_set, index in zip(data_sets, indexes, strict=True)
            ]
        require_data_to_horizons(config, rows)
        mixed = plan_mixture(config.data, batch, training, rows, read_steps)
        total_tokens = float((mixed.total_steps - first) * step_tokens)
        attended = sum(
            use.share * attended_of(data_set, batch.context_tokens, are_whole=are_whole)
            for use, data_set in zip(mixed.uses, data_sets, strict=True)
        )
        found = manifests[0].vocab_size
        if vocab_size not in (None, found):
            raise ConfigError(
                f"`vocab_size` is {vocab_size}, but the tokenizer of {config.data.description} has "
                f"{found} pieces; omit it"
            )
        vocab_size = found
        file_bytes = float(sum(shard.file_bytes for m in manifests for shard in m.shards))
        named = config.data.description if len(parts) == 1 else f"the {len(parts)} data sets"
        notes.append(
            f"documents of {named} have {_mean_length(manifests):,.0f} tokens on average; a token "
            f"attends to {attended:,.0f}"
        )
    else:
        attended = (batch.context_tokens + 1) / 2
        file_bytes = None
        notes.append(
            f"{config.data.description} does not exist yet; assuming one document per row (a token "
            f"attends to {attended:,.0f} on average) and a vocabulary of "
            f"{vocab_size or DEFAULT_VOCAB_SIZE:,} pieces"
        )
    if total_tokens is None and steps is not None:
        total_tokens = float((steps - first) * step_tokens)
    if file_bytes is None and total_tokens is not None:
        file_bytes = total_tokens / (config.training.epochs or 1.0) * _SHARD_BYTES_PER_TOKEN
        notes.append(f"shards take {_SHARD_BYTES_PER_TOKEN} bytes per token")
    if total_tokens is None:
        notes.append(
            "the length of the run is unknown without the data; set training.steps or "
            "`training_tokens`"
        )
    return RunFacts(
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        attended_tokens=attended,
        total_tokens=total_tokens,
        shard_bytes=file_bytes,
        notes=tuple(notes),
        data=() if mixed is None else mixed.uses,
        end_reason=None if mixed is None else mixed.end_reason,
    )


def _rows_per_epoch(manifest: Manifest, context_tokens: int) -> int:
    shard_tokens = np.array([entry.tokens for entry in manifest.split("train")], dtype=np.int64)
    num_tokens = int(shard_tokens.sum())
    if not num_tokens or manifest.frame_tokens % context_tokens:  # refused when the run starts
        return max(1, ceil(num_tokens / context_tokens))
    return RowGrid(shard_tokens, manifest.frame_tokens, context_tokens).rows_per_epoch


def _branch_of(config: Config, notes: list[str]) -> BranchPoint | None:
    """The point at which the run leaves its trunk, if it is a branch of a run that exists."""
    try:
        branch = find_branch_point(config)
    except CheckpointMissingError:
        trunk = shown_url(str(config.branch_from))
        notes.append(f"branch_from {trunk} has no checkpoint yet; counting all steps")
        return None
    if branch is not None:
        notes.append(f"branch from {branch.description}; steps, time and tokens are its own")
    return branch


def _mean_length(manifests: list[Manifest]) -> float:
    totals = [manifest.total("train") for manifest in manifests]
    return sum(t["tokens"] for t in totals) / max(sum(t["documents"] for t in totals), 1)
