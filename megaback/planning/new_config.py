"""A new config: sizes by the scaling rules, fitted to a machine, with the reason of each value.

Loads no torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.errors import ConfigError, NotEnoughMemoryError
from megaback.config import Config
from megaback.planning import scaling_rules as rules
from megaback.planning.budget import Budget, SizedRun, sized_run
from megaback.planning.data_facts import RunFacts
from megaback.planning.data_summary import DataSummary
from megaback.planning.flops import ModelSize
from megaback.planning.plan import fits
from megaback.planning.run_settings import Cluster

_MAX_MICRO_TOKENS = {True: 8_192, False: 65_536}
"""Maximum tokens per micro-batch, on a CPU and on a GPU."""
_MIN_MICRO_TOKENS = 8_192
"""Tokens per micro-batch below which a GPU is used badly, so that memory is saved elsewhere."""
_MAX_RATE_RATIO = 2.0


class _Saving(NamedTuple):
    """Settings that decide how much memory a step takes."""

    stage: int
    checkpointing: str
    offload: str
    optimizer: str


_SAVINGS = (
    _Saving(1, "none", "none", "muon"),
    _Saving(1, "selective", "none", "muon"),
    _Saving(2, "selective", "none", "muon"),
    _Saving(3, "selective", "none", "muon"),
    _Saving(3, "block", "none", "muon"),
    _Saving(1, "selective", "optimizer", "muon"),
    _Saving(1, "selective", "optimizer", "adamw"),
    _Saving(3, "block", "parameters", "adamw"),
)
"""ZeRO stage, activation checkpointing, offload and optimizer, fastest first. On few devices
Muon's update does not fit even with offload."""
_Z_LOSS = 1e-4


@dataclass(frozen=True)
class Choice:
    """A value of the config, and why it was chosen."""

    key: str
    value: Any
    reason: str = ""
    """Empty: what the options or the machine say."""


@dataclass(frozen=True, kw_only=True)
class NewConfig:
    """A config whose values have reasons."""

    config: Config
    choices: tuple[Choice, ...]
    data: DataSummary
    run: SizedRun
    facts: RunFacts
    notes: tuple[str, ...]
    """Assumptions, and limits of what was chosen."""


def new_config(budget: Budget, data: DataSummary, cluster: Cluster, run_folder: str) -> NewConfig:
    """Choose a config.

    Raises ConfigError for a budget that suffices for no run, and NotEnoughMemoryError for a model
    that does not fit.
    """
    run = sized_run(budget, data)
    rows, steps = _rows_and_steps(run, cluster.ranks)
    facts = RunFacts(
        vocab_size=data.vocab_size,
        attended_tokens=data.attended_tokens(run.context_tokens),
        total_tokens=float(steps * rows * run.context_tokens),
        shard_bytes=None,
        notes=(),
    )
    choices = [
        Choice("run", run_folder),
        Choice("data.shards", data.shards, _data_reason(data)),
        *_model_choices(run, data),
        *_batch_choices(run, rows, cluster.ranks),
        *_optimizer_choices(run, rows, steps),
        *_training_choices(run, budget, data, steps, cluster),
        *_machine_choices(cluster),
        *_interval_choices(run, data, steps),
    ]
    choices = _fitted(choices, facts, cluster)
    if steps < rules.MIN_STEPS:
        raise ConfigError(
            f"this budget suffices for {run.tokens:,.0f} tokens, and training needs at least "
            f"{rules.MIN_STEPS} steps of {rows * run.context_tokens:,}; give a larger one"
            + (", or more text" if run.is_capped else "")
        )
    return NewConfig(
        config=_config(choices),
        choices=tuple(choices),
        data=data,
        run=run,
        facts=facts,
        notes=tuple(_notes(run, data, rows, cluster.ranks)),
    )


def fields_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """The config's fields, by section."""
    fields: dict[str, Any] = {}
    for choice in choices:
        section, _, key = choice.key.rpartition(".")
        place = fields.setdefault(section, {}) if section else fields
        place[key] = choice.value
    return fields


def _config(choices: list[Choice]) -> Config:
    config = Config.model_validate(fields_of(choices))
    return config.model_copy(update={"model": config.model.resolved()})


def _rows_and_steps(run: SizedRun, ranks: int) -> tuple[int, int]:
    """Rows per step, a power of two for each rank, and steps."""
    wanted = run.batch_tokens / (run.context_tokens * ranks)
    rows = ranks * 2 ** max(round(math.log2(wanted)), 0)
    return rows, max(round(run.tokens / (rows * run.context_tokens)), 1)


def _data_reason(data: DataSummary) -> str:
    if data.data_set is None:
        return f"a placeholder; a vocabulary of {data.vocab_size:,} is assumed"
    return f"{data.train_tokens:,} tokens to train on, vocabulary {data.vocab_size:,}"


def _model_choices(run: SizedRun, data: DataSummary) -> Iterator[Choice]:
    shape, size = run.shape, ModelSize.of(run.shape, data.vocab_size)
    aspect = shape.width / shape.num_layers
    yield Choice(
        "model.num_layers",
        shape.num_layers,
        f"{size.total:,} parameters, {run.parameters:,} of which multiply a token",
    )
    yield Choice(
        "model.width",
        shape.width,
        f"{aspect:.0f} times the depth: 32 in small models here, 64 to 128 in OLMo-core's ladder",
    )
    yield Choice("model.num_heads", shape.num_heads, f"heads of {shape.head_size}")
    if shape.tie_embeddings:
        yield Choice(
            "model.tie_embeddings",
            True,
            "two matrices would be over a third of the model",
        )
    else:
        yield Choice(
            "model.base_width",
            shape.width,
            "muP: the learning rates also hold for a changed width (Yang et al., 2022)",
        )


def _batch_choices(run: SizedRun, rows: int, ranks: int) -> Iterator[Choice]:
    context = run.context_tokens
    yield Choice("batch.context_tokens", context, "by the model's size, and the documents' lengths")
    ladder, wanted = run.ladder_batch_tokens, run.batch_tokens
    reason = f"{rows * context:,} tokens; OLMo-core's ladder has {ladder:,.0f} for this length"
    if rows == ranks and wanted < rows * context:
        reason += "; one row per rank"
    elif wanted > ladder:
        reason += ", with which Muon's update would be over a third of a step"
    yield Choice("batch.global_batch_rows", rows, reason)
    yield Choice("batch.micro_batch_rows", rows)  # until memory is counted


def _optimizer_choices(run: SizedRun, rows: int, steps: int) -> Iterator[Choice]:
    step_tokens = rows * run.context_tokens
    ratio = min(math.sqrt(step_tokens / run.ladder_batch_tokens), _MAX_RATE_RATIO)
    rate = float(f"{rules.learning_rate(run.parameters) * ratio:.2g}")
    warmup = max(min(round(run.parameters / step_tokens), round(rules.MAX_WARMUP_SHARE * steps)), 1)
    yield Choice("optimizer.name", "muon", "better than AdamW here (benchmarks/README.md)")
    reason = "OLMo-core's ladder with Muon, which agrees with the small configs here"
    if not 1 / 1.05 < ratio < 1.05:
        reason += f"; x {ratio:.2f} for the batch (square root)"
    yield Choice("optimizer.learning_rate", rate, reason)
    yield Choice("optimizer.schedule", "linear", "to zero (Bergsma et al., 2025)")
    yield Choice("optimizer.final_learning_rate_ratio", 0.0)
    yield Choice(
        "optimizer.warmup_steps",
        warmup,
        "OLMo-core: a token per parameter; at most a twentieth of the steps",
    )
    yield Choice("optimizer.weight_decay", rules.WEIGHT_DECAY, "OLMo-core's ladder")


def _training_choices(
    run: SizedRun, budget: Budget, data: DataSummary, steps: int, cluster: Cluster
) -> Iterator[Choice]:
    reason = f"{run.tokens:,.0f} tokens, {run.tokens_per_parameter:.1f} per parameter"
    if run.is_capped:
        reason += f": {rules.MAX_EPOCHS} epochs at most (Muennighoff et al., 2023)"
    elif budget.seconds is not None:
        reason += f" in {budget.seconds / 60:,.4g} minutes of steps"
    elif budget.flops is not None:
        reason += f" for {budget.flops:.3g} FLOPs"
    else:
        reason += " (nanochat, with Muon; Chinchilla: 20 of all)"
    if data.train_tokens is not None and not run.is_capped:
        reason += f"; {run.tokens / data.train_tokens:.2g} epochs"
    yield Choice("training.steps", max(steps, 1), reason)
    is_bf16 = _is_bf16(cluster)
    yield Choice(
        "training.precision",
        "bf16" if is_bf16 else "fp32",
        "" if is_bf16 else "this device has no fast bf16",
    )
    if is_bf16:
        yield Choice("optimizer.z_loss", _Z_LOSS, "keeps logits small (PaLM)")
    yield Choice("training.activation_checkpointing", "none")
    yield Choice("zero.stage", 1)


def _is_bf16(cluster: Cluster) -> bool:
    return not cluster.device.is_cpu and cluster.device.bf16_flops is not None


def _machine_choices(cluster: Cluster) -> Iterator[Choice]:
    yield Choice("hardware.device", "cpu" if cluster.device.is_cpu else "cuda")
    if not cluster.device.is_cpu:
        yield Choice("hardware.device_name", cluster.device.name)
    yield Choice("hardware.processes", cluster.devices_per_node)


def _interval_choices(run: SizedRun, data: DataSummary, steps: int) -> Iterator[Choice]:
    if run.measures_during_training:
        yield Choice("validation.every_steps", min(math.ceil(steps / 4), 1000))
    elif data.val_tokens:
        yield Choice(
            "validation.every_steps",
            None,
            "at the start and the end: the val set is large for this budget",
        )
    yield Choice("checkpoint.every_steps", min(max(steps // 10, 50), 1000))
    yield Choice("logging.every_steps", min(max(steps // 50, 1), 100))


def _fitted(choices: list[Choice], facts: RunFacts, cluster: Cluster) -> list[Choice]:
    """The choices, with the fastest micro-batch, checkpointing and stage for the memory.

    Raises NotEnoughMemoryError.
    """
    config = _config(choices)
    context = config.batch.context_tokens
    rank_rows = config.batch.global_batch_rows // cluster.ranks
    is_cpu = cluster.device.is_cpu
    largest = min(rank_rows, max(_MAX_MICRO_TOKENS[is_cpu] // context, 1))
    smallest = min(largest, max(_MIN_MICRO_TOKENS // context, 1))
    savings = [
        saving
        for saving in _SAVINGS
        if (saving.offload == "none" or not is_cpu) and (cluster.ranks > 1 or saving.stage != 2)
    ]
    for low in (smallest, 1):
        for saving in savings:
            rows = largest
            while rows >= low:
                chosen = _with_memory(choices, rows, saving)
                if fits(_config(chosen), facts, cluster):
                    return chosen
                rows //= 2
    raise NotEnoughMemoryError(
        f"a model of {ModelSize.of(config.model, facts.vocab_size).total:,} parameters does not "
        f"fit {cluster.shown}; give a smaller one, or more or larger devices"
    )


def _with_memory(choices: list[Choice], rows: int, saving: _Saving) -> list[Choice]:
    values: dict[str, Any] = {
        "batch.micro_batch_rows": rows,
        "training.activation_checkpointing": saving.checkpointing,
        "zero.stage": saving.stage,
    }
    reasons = dict.fromkeys(values, "the fastest that fits")
    if saving.optimizer != "muon":
        values["optimizer.name"] = saving.optimizer
        reasons["optimizer.name"] = "Muon's update does not fit; OLMo-core has one rate for both"
    changed = [
        Choice(one.key, values[one.key], reasons[one.key]) if one.key in values else one
        for one in choices
    ]
    if saving.offload != "none":
        changed.append(Choice("zero.offload", saving.offload, "nothing faster fits"))
    return changed


def _notes(run: SizedRun, data: DataSummary, rows: int, ranks: int) -> Iterator[str]:
    if data.data_set is None:
        yield (
            f"{data.shards} is a placeholder: set data.shards, and build the shards with a "
            f"vocabulary near {data.vocab_size:,}; one document per row is assumed"
        )
    if run.is_capped:
        yield (
            f"the data set limits the run to {run.tokens:,.0f} tokens, {rules.MAX_EPOCHS} epochs; "
            "more text would use the rest of the budget"
        )
    if run.tokens_per_parameter < rules.TOKENS_PER_PARAMETER / 4:
        yield (
            f"{run.tokens_per_parameter:.2g} tokens per parameter are few: a smaller model would "
            "be as good and faster"
        )
    wanted = run.batch_tokens
    if rows == ranks and rows * run.context_tokens > 2 * wanted:
        enough = max(round(wanted / run.context_tokens), 1)
        yield (
            f"{ranks} ranks need a larger batch than this run can use: {enough} would train as "
            "well on as many tokens"
        )
