"""Cost of a sweep's runs before they start: parameters, tokens, FLOPs and device-hours."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.common.terminal import table_lines
from megaback.config import Config
from megaback.planning.data_facts import RunFacts, run_facts
from megaback.planning.devices import find_device
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.plan import DEFAULT_MFU
from tools.sweeps.result import RunResult
from tools.sweeps.runs import SweepRun, data_kind

_HEADS = ("run", "state", "parameters", "tokens", "PFLOP", "device-hours")


@dataclass(frozen=True)
class Cost:
    """Estimates for one run."""

    num_parameters: int
    tokens: float
    flops: float
    device_hours: float | None
    """Hours of one device at an MFU; None if its peak FLOP/s is unknown."""


def costs_of(runs: Sequence[SweepRun], mfu: float) -> list[Cost]:
    """The cost of each run. Manifests are read once per kind of data. Raises their errors."""
    facts: dict[str, RunFacts] = {}
    costs = []
    for run in runs:
        config = run.config
        kind = data_kind(config)
        if kind not in facts:
            facts[kind] = run_facts(config, None, None)
        costs.append(_cost(config, facts[kind], mfu))
    return costs


def _cost(config: Config, facts: RunFacts, mfu: float) -> Cost:
    tokens = facts.total_tokens or 0.0
    flops = tokens * flops_per_token(
        config.model, facts.vocab_size, facts.attended_tokens, config.finetune.adapters
    )
    name = config.hardware.device_name
    peak = config.hardware.peak_flops
    if peak is None and name is not None:
        peak = find_device(name).peak_flops(config.training.precision)
    hours = None if peak is None else flops / (peak * mfu) / 3600
    num_parameters = ModelSize.of(config.model, facts.vocab_size).total
    return Cost(num_parameters, tokens, flops, hours)


def cost_lines(
    runs: Sequence[SweepRun], states: Sequence[RunResult], mfu: float = DEFAULT_MFU
) -> list[str]:
    """A table of all runs, and their sum over those that are left to train."""
    costs = costs_of(runs, mfu)
    rows = [
        (run.name, state.state, *_cells(cost))
        for run, state, cost in zip(runs, states, costs, strict=True)
    ]
    left = [cost for cost, state in zip(costs, states, strict=True) if not state.is_over]
    hours = [cost.device_hours for cost in left if cost.device_hours is not None]
    total = Cost(
        sum(cost.num_parameters for cost in left),
        sum(cost.tokens for cost in left),
        sum(cost.flops for cost in left),
        sum(hours) if len(hours) == len(left) else None,
    )
    rows.append((f"{len(left)} to train", "", "", *_cells(total)[1:]))
    lines = table_lines(_HEADS, rows, right=range(2, len(_HEADS)))
    if total.device_hours is None:
        lines.append("device-hours are unknown: set hardware.peak_flops, the FLOP/s of a device")
    else:
        lines.append(f"device-hours assume an MFU of {mfu:.0%}: --mfu sets another")
    return lines


def _cells(cost: Cost) -> tuple[str, str, str, str]:
    hours = "" if cost.device_hours is None else f"{cost.device_hours:,.2f}"
    return f"{cost.num_parameters:,}", f"{cost.tokens:,.0f}", f"{cost.flops / 1e15:.3g}", hours
