"""Val losses of an average of weights and of its last source, on the same rows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.errors import ConfigError
from data_pipeline.loading.loader import SequentialRows
from data_pipeline.loading.measured_rows import measured_rows
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.checkpoint import config_of, read_meta
from megaback.config_data import DataSection
from megaback.inference.placement import choose_device, choose_dtype
from megaback.open_shards import open_shards
from megaback.run_folder import META_NAME, METRICS_NAME
from megaback.tracking.loss_by_context import Loss
from megaback.tracking.metrics import read_metrics
from megaback.weights.identity import description_of
from megaback.weights.model_folder import empty_model
from megaback.weights.source import WeightSource, open_source
from tools.suites.loss_sums import loss_sums

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class ValLosses:
    """Losses of an average and of the last of its sources."""

    of_average: Loss
    of_last: Loss

    def sentence(self) -> str:
        average, last = _shown(self.of_average), _shown(self.of_last)
        return f"{average} of the average, {last} of the last one"

    def in_description(self, average: WeightSource) -> WeightSource:
        """The average, with both losses in its description."""
        of = average.description.average
        assert of is not None
        measured = replace(
            average.description,
            val_loss=_finite(self.of_average),
            average=replace(of, last_val_loss=_finite(self.of_last)),
        )
        if measured.training is not None:
            bits = replace(measured.training, val_bits_per_byte=self.of_average.bits_per_byte)
            measured = replace(measured, training=bits)
        return replace(average, description=measured)


def with_val_bits_per_byte(source: WeightSource, path: Path) -> WeightSource:
    """A checkpoint's weights with the bits per byte that its run measured at its step, if it did.

    Raises the errors of `read_metrics` for metrics that cannot be read.
    """
    description, described_by = source.description, description_of(path)
    training = description.training
    if described_by.name != META_NAME or training is None:
        return source
    run = described_by.parents[2]
    if not (run / METRICS_NAME).is_file():
        return source
    measured = [
        line["val_bits_per_byte"]
        for line in read_metrics(run)
        if line.get("step") == description.step and line.get("val_bits_per_byte") is not None
    ]
    training = replace(training, val_bits_per_byte=measured[-1] if measured else None)
    return replace(source, description=replace(description, training=training))


def _shown(loss: Loss) -> str:
    bits = "" if loss.bits_per_byte is None else f" ({loss.bits_per_byte:.4f} bits/byte)"
    return f"{loss.nats_per_token:.4f} nats/token{bits}"


def _finite(loss: Loss) -> float | None:
    return loss.nats_per_token if math.isfinite(loss.nats_per_token) else None


def measure_val_losses(
    average: WeightSource, shards: str | None = None, device: str | None = None
) -> ValLosses:
    """Losses of an average and of the last of its sources, one model in memory at a time.

    The val set is that of `shards`, or of the data of the run of the last checkpoint. Raises
    ConfigError without a val set, BackendError, NotEnoughMemoryError, and the errors of data sets.
    """
    description = average.description
    assert description.average is not None
    paths = [Path(source.path) for source in description.average.sources]
    where = choose_device(device)
    model = empty_model(paths[-1], description, where, choose_dtype("auto", where))
    rows = _val_rows(average, paths, shards)
    micro_rows = max(1, _TOKENS_AT_ONCE // description.context_tokens)
    num_bytes = TextCodec.of(average.tokenizer, description.text_format).piece_num_bytes()
    losses = []
    with SafeProgress(console=SafeConsole(stderr=True), transient=True) as progress:
        for name, source in (("average", average), ("last", open_source(paths[-1]))):
            bar = progress.add_task(f"val loss, {name}", total=rows.num_rows)
            source.fill(model)
            batches = rows.slices(0, rows.num_rows, micro_rows, micro_rows)
            sums = [0.0, 0.0, 0.0]
            for of_batch in loss_sums(model, batches, num_bytes, where):
                sums = [total + one for total, one in zip(sums, of_batch, strict=True)]
                progress.advance(bar, micro_rows)
            losses.append(Loss.of_sums(*sums))
    return ValLosses(*losses)


def _val_rows(average: WeightSource, paths: Sequence[Path], shards: str | None) -> SequentialRows:
    if shards is None:
        opened = open_shards(_data_of(paths))
    else:
        opened = open_shards(DataSection.model_validate({"shards": shards}))
    if not opened.val_sets:
        raise ConfigError(
            f"{opened.section.description} has no val set; name a data set that has one"
        )
    described = average.description
    readers = [
        measured_rows(data_set, f"{paths[-1]}", described.text_format, described.context_tokens)
        for data_set in opened.val_sets
    ]
    return SequentialRows(readers, 0, 1, 1)


def _data_of(paths: Sequence[Path]) -> DataSection:
    """The data of the run of the last checkpoint. Raises ConfigError if all are model folders."""
    for path in reversed(paths):
        described_by = description_of(path)
        if described_by.name == META_NAME:
            checkpoint = described_by.parent
            return config_of(checkpoint, read_meta(checkpoint)).data
    raise ConfigError("none is a checkpoint, whose run names its data; name a data set as `shards`")
