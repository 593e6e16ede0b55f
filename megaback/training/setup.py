"""Setup of a run before the training loop: data, model, engine, and the checkpoint to resume from.

All checks that can refuse a start come before anything is written (`_accept`).
"""

import logging
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from data_pipeline.common.atomic import write_text
from data_pipeline.common.local_paths import local_path
from data_pipeline.common.output_paths import require_apart
from data_pipeline.errors import (
    CheckpointCorruptError,
    LaunchError,
    MegabackError,
    OutputExistsError,
)
from megaback.branches import BranchPoint, began_as, find_branch_point
from megaback.checkpoints.checkpoint import CheckpointMeta, load_into_engine, newest_checkpoint
from megaback.checkpoints.fetching import fetch_newest
from megaback.checkpoints.remote_copy import CopyTarget, newest_meta
from megaback.checkpoints.state import load_weights, refresh_copies
from megaback.config import Config
from megaback.data import Data, open_data
from megaback.distributed.device_limits import (
    available_memory,
    device_peak_flops,
    require_host_memory,
    require_precision,
)
from megaback.distributed.engine import start_engine
from megaback.distributed.sequence_parallel import over_whole_rows
from megaback.distributed.shard_groups import require_equal_nodes
from megaback.distributed.world import World
from megaback.faults.exit_record import record_start
from megaback.faults.preflight import preflight
from megaback.faults.run_lock import lock_holder, lock_run, release_lock
from megaback.faults.run_ownership import place_of_config, require_run_folder
from megaback.faults.start_fence import Fence
from megaback.faults.step_guard import read_excluded_steps
from megaback.faults.watchdog import Watchdog
from megaback.model.attention_choice import (
    Attention,
    choose_attention,
    report_slow_attention,
    require_same_attention,
)
from megaback.model.compiler import GraphCounter, why_not_compiled
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import initial_adapters, require_peft
from megaback.model.mup import initial_weights
from megaback.planning.adapters import adapter_shapes
from megaback.planning.flops import flops_per_token
from megaback.planning.memory_room import AvailableMemory, require_memory
from megaback.run_folder import (
    CHECKPOINTS_FOLDER,
    LOCK_NAME,
    complete_checkpoints,
    newest_checkpoint_step,
    step_name,
)
from megaback.tracking.trackers import require_installed
from megaback.training.base import (
    RunBase,
    fetch_remote_base,
    open_local_base,
    remove_fetched_base,
)
from megaback.training.branch import continue_records
from megaback.training.frozen_base import freeze_base
from megaback.training.run import Run
from megaback.training.same_run import require_same_run
from megaback.training.start import (
    AlreadyTrained,
    Changes,
    already_trained,
    changes_on_resume,
    require_readable,
)
from megaback.training.suites import open_suites

_NOTHING: Mapping[str, Any] = MappingProxyType({})

_LOG = logging.getLogger("megaback.training")


def prepare_run(
    config: Config, world: World, watchdog: Watchdog, config_path: Path | None = None
) -> Run | AlreadyTrained:
    """Set up data, model and engine, from the newest checkpoint that verifies, if there is one.

    `config_path`: file of the config.

    Any rank's MegabackError stops all ranks with one message. The watchdog is opened once the run's
    folder is locked and the start is accepted; nothing is written before.
    """
    world.run_collectively(_on_first_rank, world, require_run_folder, config, config_path)
    is_new = not world.of_first((config.run / LOCK_NAME).exists(), bool)
    lock = None if is_new else world.run_collectively(_lock_run_folder, config, world)
    branch = world.run_collectively(_find_branch_point, config, world)
    branch = world.of_first(branch, BranchPoint | None)
    data = world.run_collectively(open_data, config, world.rank, world.size, branch)
    world.run_collectively(require_precision, config.training.precision, world.device)
    require_equal_nodes(config.zero, world)
    attention = world.run_collectively(_choose_attention, config, world)
    world.run_collectively(require_same_attention, world.gather(attention.name, str))
    compiler = world.run_collectively(_choose_compiler, config, world, attention)
    world.run_collectively(require_installed, config)
    if config.finetune.adapters is not None:
        world.run_collectively(require_peft)
    world.run_collectively(_on_first_rank, world, _require_copy_target, config, data)
    seen_step = _newest_step(config, world)
    found, fetched_meta = _find_start(config, world)
    meta = found[1] if found is not None else fetched_meta
    changes: Changes = {}
    if fetched_meta is not None and fetched_meta.branch != data.branch:
        branch = world.run_collectively(began_as, config, fetched_meta.branch)
        data = world.run_collectively(open_data, config, world.rank, world.size, branch)
    if meta is not None:
        target = config.run / CHECKPOINTS_FOLDER / step_name(meta.step)
        world.run_collectively(require_same_run, config, data, target, meta)
        world.run_collectively(require_readable, config.run)
        changes = changes_on_resume(meta.config, config)
        length = (data.total_steps, data.mixed.end_reason)
        ended = world.run_collectively(already_trained, config, meta, *length)
        ended = world.of_first(ended, AlreadyTrained | None)
        if ended is not None and fetched_meta is None:
            data.training.close()
            if not is_new and not ended.is_recorded:
                watchdog.begin(lock)
                _record_end(config, world, watchdog, config_path, ended, data.total_steps)
            if lock is not None:
                release_lock(lock)
            return ended
    suites = open_suites(config, data, world)
    # Before the model is created, which is whole on every rank.
    rooms = world.gather(available_memory(world.device), AvailableMemory)
    world.run_collectively(require_memory, config, data.codec.vocab_size, rooms)
    base = RunBase() if meta is not None else open_local_base(config, data, world)

    model = ReverseGPT(
        config.model,
        data.codec.vocab_size,
        over_whole_rows(attention.backend, config, world),
        config.training.activation_checkpointing,
        config.optimizer.z_loss,
        config.training.loss_chunk_tokens,
    )
    world.run_collectively(
        require_host_memory,
        config.zero.offload,
        model.num_parameters(),
        config.training.precision,
        world.gather(socket.gethostname(), str).count(socket.gethostname()),
        world.size,
    )
    if is_new:
        lock = world.run_collectively(_lock_run_folder, config, world)
    watchdog.begin(lock)
    if fetched_meta is not None:
        found = _fetch_start(config, world, watchdog.fence)
    elif _newest_step(config, world) != seen_step:  # an older start has saved meanwhile
        found = newest_checkpoint(config.run, world)
    if found is not None:
        base = RunBase()
    else:
        base = fetch_remote_base(config, data, world, watchdog.fence, base)
    trunk = base.trunk
    start_step = found[1].step if found is not None else 0
    if trunk is not None and data.branch is not None:
        start_step = data.branch.step
    watchdog.open()
    accepted = (start_step, data.total_steps, changes, watchdog.fence)
    world.run_collectively(_accept, config, world, config_path, *accepted, base.facts)
    if trunk is not None:
        continued = (config, data.branch, trunk, watchdog.fence)
        world.run_collectively(_on_first_rank, world, continue_records, *continued)
    world.run_collectively(watchdog.remember_folder)
    watchdog.set_phase("checking the nodes", start_step)
    preflight(config, data, world, watchdog.fence)
    watchdog.set_phase("starting", start_step)
    attended = world.run_collectively(data.attended_tokens)
    adapters, shapes, frozen = config.finetune.adapters, model.shapes(), None
    token_flops = flops_per_token(config.model, data.codec.vocab_size, attended, adapters)
    if adapters is not None:
        held = found or trunk or base.weights
        assert held is not None
        frozen = freeze_base(model, adapters, config.run, world, watchdog.fence, held)
    num_parameters = model.num_parameters()
    if compiler is not None and not attention.is_traceable:
        model.exclude_attention_from_compile()
    engine = start_engine(model, config, data.micro_batch_rows, data.accumulation_steps, compiler)
    if found is not None:
        load_into_engine(engine, *found, world)
    elif trunk is not None and data.branch is not None:
        only_weights = not data.branch.continues("optimizer")
        load_into_engine(engine, *trunk, world, only_weights=only_weights)
    else:
        # Into the engine rather than the model, of which it only has copies in bf16.
        if adapters is not None:
            adapter_sizes = adapter_shapes(config.model, adapters)
            weights: Iterable[tuple[str, Tensor]] = initial_adapters(
                adapter_sizes, config.training.seed
            )
        elif (given := base.weights) is not None:
            weights = ((name, given.read(name)) for name in shapes)
        else:
            weights = initial_weights(config.model, shapes, config.training.seed)
        world.run_collectively(load_weights, engine, weights)
        refresh_copies(engine)
    remove_fetched_base(config.run, world)
    return Run(
        config=config,
        data=data,
        engine=engine,
        start_step=start_step,
        val_loss=found[1].val_loss if found is not None else None,
        attention=attention.name,
        compiler=compiler,
        num_parameters=num_parameters,
        flops_per_token=token_flops,
        peak_flops=config.hardware.peak_flops
        or device_peak_flops(world.device, config.training.precision),
        excluded=tuple(
            world.of_first(
                world.run_collectively(read_excluded_steps, config.run), list[tuple[int, int]]
            )
        ),
        watchdog=watchdog,
        lock=lock,
        changes=changes,
        suites=suites,
        frozen=frozen,
        imported=base.imported if found is None else found[1].imported,
        begins_branch=trunk is not None,
    )


def _choose_attention(config: Config, world: World) -> Attention:
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    head_dim = config.model.head_size
    attention = choose_attention(config.hardware.attention, world.device, dtype, head_dim)
    if world.is_first:
        report_slow_attention(attention, world.device, dtype, head_dim)
    return attention


def _choose_compiler(config: Config, world: World, attention: Attention) -> GraphCounter | None:
    training, device = config.training, world.device.type
    reason = why_not_compiled(training, config.zero.stage, device, attention)
    if reason is None:
        return GraphCounter()
    if world.is_first and training.compile == "auto" and device != "cpu":
        _LOG.warning("training is not compiled: %s", reason)
    return None


def _on_first_rank(world: World, question: Callable[..., None], *arguments: Any) -> None:
    """Run a check on the first rank only, which is the one that writes."""
    if world.is_first:
        question(*arguments)


def _lock_run_folder(config: Config, world: World) -> IO[bytes] | None:
    """Lock the run's folder until `release_lock`."""
    if not world.is_first:
        return None
    config.run.mkdir(parents=True, exist_ok=True)
    lock = lock_run(config.run)
    if lock is None:
        holder = lock_holder(config.run)
        who = f" ({holder.name})" if holder is not None else ""
        raise LaunchError(
            f"another process is training in {config.run}{who}; wait for it, or use another run "
            "folder"
        )
    return lock


def _find_branch_point(config: Config, world: World) -> BranchPoint | None:
    return find_branch_point(config) if world.is_first else None


def _newest_step(config: Config, world: World) -> int:
    """The step of the newest complete checkpoint, as the first rank sees it. Collective."""
    return world.of_first(newest_checkpoint_step(config.run) if world.is_first else 0, int)


def _find_start(
    config: Config, world: World
) -> tuple[tuple[Path, CheckpointMeta] | None, CheckpointMeta | None]:
    """The newest checkpoint that verifies, or else the metadata of the newest copy in `copy_to`.

    Nothing is fetched yet.
    """
    copy_to = config.checkpoint.copy_to
    error: CheckpointCorruptError | None = None
    found = meta = None
    try:
        found = newest_checkpoint(config.run, world)
    except CheckpointCorruptError as problem:
        error = problem
    if found is None and copy_to is not None:
        meta = world.of_first(
            world.run_collectively(_read_copy_target, config.run, copy_to, world),
            CheckpointMeta | None,
        )
        error = None if meta is not None else error
    world.stop_if_any(error)
    return found, meta


def _require_copy_target(config: Config, data: Data) -> None:
    """Raises OutputExistsError if copies of checkpoints would not have a location of their own.

    A location that cannot be reached now is not an error: it is reported with every copy.
    """
    copy_to = config.checkpoint.copy_to
    if copy_to is None:
        return
    folder = local_path(copy_to)
    if folder is not None:
        bases = (config.init_from, config.branch_from)
        inputs = (config.run, *bases, *(part.path for part in config.data.shards))
        require_apart(folder / config.run.resolve().name, inputs, "checkpoint.copy_to")
    try:
        place = CopyTarget(copy_to, config.run)
        place.require_ours()
        meta = newest_meta(place) if complete_checkpoints(config.run) else None
    except MegabackError:
        raise
    except Exception:  # noqa: BLE001 (file systems raise errors of any type)
        return
    if meta is not None:
        try:
            require_same_run(config, data, Path(step_name(meta.step)), meta)
        except MegabackError as error:
            raise OutputExistsError(
                f"checkpoint.copy_to {place.name} contains checkpoints of another run, which this "
                f"one would replace ({error}); choose another location"
            ) from None


def _read_copy_target(run: Path, copy_to: str, world: World) -> CheckpointMeta | None:
    return newest_meta(CopyTarget(copy_to, run)) if world.is_first else None


def _fetch_start(config: Config, world: World, fence: Fence) -> tuple[Path, CheckpointMeta] | None:
    """Fetch the newest copy that verifies from `copy_to`."""
    assert config.checkpoint.copy_to is not None
    place = world.run_collectively(CopyTarget, config.checkpoint.copy_to, config.run)
    found = world.run_collectively(fetch_newest, config.run, place, world, fence)
    if found is not None and world.is_first:
        _LOG.info("%s was fetched from %s", found[0].name, place.name)
    return found


def _accept(
    config: Config,
    world: World,
    config_path: Path | None,
    start_step: int,
    total_steps: int,
    changes: Changes,
    fence: Fence,
    base: Mapping[str, Any] = _NOTHING,
) -> None:
    """Record the start of the run, and of its base if it begins, and write its config."""
    if not world.is_first:
        return
    fence.check()
    facts: dict[str, Any] = {"changed": changes} if changes else {}
    record_start(
        config.run,
        start=fence.start_id,
        step=start_step,
        total_steps=total_steps,
        world_size=world.size,
        zero_stage=config.zero.stage,
        **facts,
        **base,
    )
    place = place_of_config(config.run, config_path)
    if place is not None:
        write_text(place, config.to_yaml(), fence.replace)


def _record_end(
    config: Config,
    world: World,
    watchdog: Watchdog,
    config_path: Path | None,
    ended: AlreadyTrained,
    total_steps: int,
) -> None:
    """Record the end of a run that was killed, or failed, after its last step was saved."""
    no_changes: Changes = {}
    accepted = (ended.step, total_steps, no_changes, watchdog.fence)
    world.run_collectively(_accept, config, world, config_path, *accepted)
    if world.is_first:
        watchdog.record_exit(0, "finished", ended.reason)
