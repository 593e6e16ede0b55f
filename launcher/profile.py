"""`megaback profile`: where the time of a run's training steps goes, on one rank."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import click
from pydantic import TypeAdapter

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.import_path import module_command
from data_pipeline.common.number_ranges import COUNT, MANY_OR_ZERO
from data_pipeline.common.output_paths import overwrite_option, require_output
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo, table_lines
from data_pipeline.errors import ConfigError
from launcher.ranks.local import count_ranks, loss_grace_s, rank_environment, run_ranks, verdict
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.faults.exit_record import read_exit
from megaback.planning.data_facts import run_facts
from megaback.profiling.report import (
    DEFAULT_STEPS,
    MEMORY_NAME,
    RUN_FOLDER,
    TRACE_NAME,
    WARMUP_STEPS,
    Profile,
    report_path,
    short_config,
)

_RANK_MODULE = "megaback.profiling.rank"
_PROFILE = TypeAdapter(Profile)
_MIN_SHARE = 0.001
"""Smaller shares are in profile.json only."""


@click.command(
    cls=WorkCommand,
    name="profile",
    epilog=examples(
        "megaback profile configs/demo.yaml --out profiles/demo",
        "megaback profile configs/reverse_1b.yaml zero.stage=3 --rank 1 --out profiles/reverse_1b",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help=f"Folder of the result: profile.json, {TRACE_NAME} and, on a GPU, {MEMORY_NAME}.",
)
@click.option(
    "--steps",
    type=COUNT.option,
    default=DEFAULT_STEPS,
    show_default=True,
    help=f"Number of profiled steps, after {WARMUP_STEPS} others.",
)
@click.option(
    "--rank",
    type=MANY_OR_ZERO.option,
    default=0,
    show_default=True,
    help="Rank to profile; the others train beside it.",
)
@overwrite_option
@json_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    out: Path,
    steps: int,
    rank: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Profile a few training steps of CONFIG, with key.sub=value OVERRIDES, on one rank.

    Starts the ranks as `megaback train` does, on the run's data, in a folder within --out: nothing
    is saved, and the run's own folder is neither read nor written. Prints time by part of a step.
    """
    settings = load_config(config, overrides)
    require_output(
        out,
        (config, settings.run, settings.init_from, *(part.path for part in settings.data.shards)),
        is_ours=lambda path: report_path(path).is_file(),
        overwrite=overwrite,
    )
    run_facts(settings, None, None)  # refuses data that training refuses
    settings = short_config(config, overrides, out, steps)
    processes = count_ranks(settings)
    if rank >= processes:
        raise ConfigError(f"`rank` is {rank}, but there are {processes} ranks, numbered from 0")
    open_data(settings, 0, processes)
    run = out / RUN_FOLDER
    shutil.rmtree(run, ignore_errors=True)
    report_path(out).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    command = module_command(_RANK_MODULE, str(config), *overrides)
    command += ["--out", str(out), "--rank", str(rank), "--steps", str(steps)]
    try:
        codes, signals = run_ranks(
            command, rank_environment(processes), processes, loss_grace_s(settings)
        )
        code = verdict(codes, signals, read_exit(run))
    finally:
        shutil.rmtree(run, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
    if code:
        raise SystemExit(code)
    found = _PROFILE.validate_python(read_json(report_path(out)))
    click.echo(json.dumps(asdict(found), indent=2)) if as_json else _show(found, out)


def _show(found: Profile, out: Path) -> None:
    kind = "no GPU" if found.device == "cpu" else found.device_name
    echo(
        f"rank {found.rank} of {found.world_size} on {found.host} ({kind}), ZeRO stage "
        f"{found.zero_stage}: {found.steps} steps of {found.tokens_per_step:,} tokens, "
        f"{found.step_s:.3f} s each, {found.unprofiled_step_s:.3f} s without the profiler"
    )
    facts = [] if found.mfu is None else [f"MFU {found.mfu:.1%}"]
    if found.idle_share is not None:
        facts.append(f"the GPU is idle for {found.idle_share:.1%}")
    echo(", ".join([*facts, f"peak memory {found.memory_peak_bytes / 1e9:.2f} GB"]))
    has_device = any(one.device_s for one in found.parts)
    total_cpu_s = sum(one.cpu_s for one in found.parts) or 1.0
    total_device_s = sum(one.device_s for one in found.parts) or 1.0
    lines = []
    for one in found.parts:
        if max(one.cpu_s / total_cpu_s, one.device_s / total_device_s) < _MIN_SHARE:
            continue
        line = [one.phase, one.part, f"{one.cpu_s * 1e3:.2f}", f"{one.cpu_s / total_cpu_s:.1%}"]
        if has_device:
            line += [f"{one.device_s * 1e3:.2f}", f"{one.device_s / total_device_s:.1%}"]
        lines.append(line)
    heads = ["phase", "part", "CPU ms", "share"] + ["GPU ms", "share"] * has_device
    for text in table_lines(heads, lines, right=tuple(range(2, len(heads)))):
        click.echo(text)
    echo(f"trace: {out / TRACE_NAME}, for ui.perfetto.dev or chrome://tracing")
    if (out / MEMORY_NAME).exists():
        echo(f"memory: {out / MEMORY_NAME}, for pytorch.org/memory_viz")
    else:
        echo("memory: in the trace, as counters over time")


if __name__ == "__main__":
    main()
