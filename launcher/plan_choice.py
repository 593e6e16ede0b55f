"""Choice of settings by `megaback plan --choose`: its table, its JSON, and the edit of a config."""

import os
import stat
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.output_paths import writing_output
from data_pipeline.common.terminal import echo, table_lines
from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.planning.data_facts import RunFacts
from megaback.planning.flops import flops_per_token
from megaback.planning.rates import ASSUMPTIONS
from megaback.planning.run_settings import Cluster, peak_flops
from megaback.planning.search import Candidate, Search
from megaback.run_folder import CONFIG_COPY_NAME, RESOLVED_COPY_NAME
from megaback.tracking.run_progress import is_run
from megaback.yaml_edit import with_values

_GB = 1e9
_TITLES = (
    *("", "s per step", "arithmetic", "memory", "network", "hidden", "host", "MFU", "GB"),
    "settings that change",
)


def show_choice(config: Config, facts: RunFacts, cluster: Cluster, found: Search) -> None:
    """Print the fastest settings, the given ones, and what was assumed."""
    echo(
        f"choice   the {len(found.fastest)} fastest of {found.num_fitting} settings that fit "
        f"{cluster.shown} (of {found.num_tried}); seconds by part, GB per rank"
    )
    rows = [
        _row(str(place), one, config, facts, cluster) for place, one in enumerate(found.fastest, 1)
    ]
    if found.given is not None and all(one.changes for one in found.fastest):
        rows.append(_row("given", found.given, config, facts, cluster))
    for line in table_lines(_TITLES, rows, right=range(1, len(_TITLES) - 1), indent=9):
        click.echo(line)
    best = found.fastest[0]
    if best.memory.host_bytes_per_node and best.config.zero.offload != "none":
        echo(
            f"host     {best.memory.host_bytes_per_node / _GB:.1f} GB of memory per node, for "
            "offloaded state and checkpoints that are being written"
        )
    for note in notes_on(config, best):
        echo(f"note     {note}")
    for note in facts.notes:
        echo(f"note     {note}")
    echo("assumed  rates of published runs on GPUs; megaback has not been run on one:")
    for one in ASSUMPTIONS.values():
        echo(f"         {one.value:.3g}: {one.what} ({one.source})")


def notes_on(config: Config, best: Candidate) -> list[str]:
    """Limits of the choice."""
    notes = ["times within 1% count as equal, and the setting with fewer changes comes first"]
    if config.training.precision == "bf16":
        kept = "0 is kept" if config.zero.stage == 0 else "0 is not tried"
        notes.append(f"in bf16, stage {kept}: its fp32 weights give other losses")
    if not config.zero.overlap_communication and best.config.zero.stage in (1, 2):
        notes.append(
            "overlap at stages 1 and 2 is tried only with zero.overlap_communication=true in the "
            "config, since it had races (docs/gpu.md)"
        )
    if best.config.zero.reduction == "reduce":
        notes.append("zero.reduction=reduce makes many small calls, whose latency is assumed")
    return notes


def _row(
    name: str, one: Candidate, config: Config, facts: RunFacts, cluster: Cluster
) -> Sequence[str]:
    time, is_full = one.time, one.memory.parts.total > cluster.device.memory_bytes
    parts = (
        *(time.total_s, time.arithmetic_s, time.memory_s, time.network_s, time.hidden_network_s),
        time.host_s,
    )
    return (
        name,
        *(f"{part:.3g}" if part < 999 else f"{part:,.0f}" for part in parts),
        f"{_mfu(one, config, facts, cluster):.0%}",
        f"{one.memory.parts.total / _GB:.1f}",
        (one.overrides or "none") + "; does not fit" * is_full,
    )


def _mfu(one: Candidate, config: Config, facts: RunFacts, cluster: Cluster) -> float:
    tokens = config.batch.global_batch_rows * config.batch.context_tokens
    flops = tokens * flops_per_token(
        config.model, facts.vocab_size, facts.attended_tokens, config.finetune.adapters
    )
    peak = peak_flops(config, cluster.device)
    assert peak is not None
    return flops / (cluster.ranks * peak * one.time.total_s)


def choice_to_json(
    config: Config, facts: RunFacts, cluster: Cluster, found: Search
) -> dict[str, Any]:
    """The choice as JSON fields, in bytes and seconds."""

    def fields(one: Candidate) -> dict[str, Any]:
        return {
            "changes": one.changes,
            "step_s": one.time.total_s,
            "parts": asdict(one.time),
            "mfu": _mfu(one, config, facts, cluster),
            "memory_bytes": one.memory.parts.total,
            "host_bytes_per_node": one.memory.host_bytes_per_node,
            "fits": one.memory.parts.total <= cluster.device.memory_bytes,
        }

    return {
        "choices": [fields(one) for one in found.fastest],
        "given": None if found.given is None else fields(found.given),
        "num_tried": found.num_tried,
        "num_fitting": found.num_fitting,
        "cluster": asdict(cluster),
        "assumptions": {name: asdict(one) for name, one in ASSUMPTIONS.items()},
        "notes": [*notes_on(config, found.fastest[0]), *facts.notes],
    }


def require_own_config(path: Path, overrides: Sequence[str]) -> None:
    """Raises ConfigError unless `--write` may change a config."""
    if overrides:
        raise ConfigError(
            f"`write` changes {path} only, and the choice would depend on the overrides "
            f"{' '.join(overrides)}; put them into the file, or omit `write`"
        )
    if not path.is_file():
        raise ConfigError(f"{path} is not a file that `write` can change")
    folder = path.parent
    if path.name == RESOLVED_COPY_NAME or (path.name == CONFIG_COPY_NAME and is_run(folder)):
        raise ConfigError(
            f"{path} is the record of a run, which `write` does not change; copy it, and give the "
            "copy"
        )
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{path} is not writable; copy it, and give the copy")


def write_choice(path: Path, best: Candidate) -> str:
    """Put the changes of a candidate into a config file. Returns what was done.

    Raises ConfigError for a file whose layout does not allow it.
    """
    if not best.changes:
        return f"{path} has the fastest settings already"
    mode = stat.S_IMODE(path.stat().st_mode)
    text = path.read_bytes().decode()
    changed = with_values(text, best.changes)
    with writing_output(path, overwrite=True) as file:
        os.fchmod(file.fileno(), mode)
        file.write(changed.encode())
    return f"wrote {best.overrides} to {path}"
