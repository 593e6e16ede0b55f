"""State of a run that is ready for its next step, from `setup` to the training loop."""

from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

from data_pipeline.loading.order import ORDER_VERSION
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.safetensors_file import SizeAndHash
from megaback.checkpoints.state import num_updates
from megaback.config import ALL_KEPT, Config
from megaback.data import Data
from megaback.distributed.versions import library_versions
from megaback.distributed.world import World
from megaback.faults.watchdog import Watchdog
from megaback.horizons import horizons_of
from megaback.model.compiler import GraphCounter
from megaback.origins import Import
from megaback.planning.adapters import num_trained
from megaback.training.start import Changes
from megaback.training.suites import Suites


@dataclass(frozen=True, kw_only=True)
class Run:
    """Data, model and engine of a run, and its first step."""

    config: Config
    data: Data
    engine: Any
    start_step: int
    val_loss: float | None
    """Loss of the latest validation, in nats per target, if the run was resumed."""
    attention: str
    compiler: GraphCounter | None
    """Compiler of the model, if it is compiled."""
    num_parameters: int
    """Number of all parameters, with frozen ones."""
    flops_per_token: float
    peak_flops: float | None
    excluded: tuple[tuple[int, int], ...]
    """Ranges (first, last) of steps that a rollback excludes."""
    watchdog: Watchdog
    lock: IO[bytes] | None
    """Lock of the run's folder, held while it is open."""
    changes: Changes
    """Keys of the config that were changed on resume."""
    suites: Suites | None
    """Benchmarks that are measured during training."""
    frozen: SizeAndHash | None = None
    """Size and hash of the file with the frozen weights, of a run with LoRA."""
    imported: Import | None = None
    """Origin of the first weights, if another program has trained them."""
    begins_branch: bool = False
    """Whether this start is the first of a branch, which has no checkpoint of its own yet."""

    @cached_property
    def pinned_steps(self) -> frozenset[int]:
        """Steps from whose checkpoints the branches of its horizons continue."""
        return frozenset(horizon.branch_step for horizon in horizons_of(self.config))

    @property
    def guarded_since(self) -> int:
        """Number of steps before the first one that the guard compares with."""
        branch = self.data.branch
        return 0 if branch is None or branch.kept == ALL_KEPT else branch.step

    def is_excluded(self, step: int) -> bool:
        """Whether a step, counted from 1, is excluded by a rollback."""
        return any(first <= step <= last for first, last in self.excluded)

    def step_flops_share(self, world: World) -> float | None:
        """FLOPs of a step divided by the devices' peak: the MFU of a step that takes one second."""
        if self.peak_flops is None:
            return None
        batch = self.config.batch
        step_tokens = batch.global_batch_rows * batch.context_tokens
        return step_tokens * self.flops_per_token / (self.peak_flops * world.size)

    def meta(self, step: int, val_loss: float | None, world: World) -> CheckpointMeta:
        """Metadata of a checkpoint at this step; files are added when it is written."""
        return CheckpointMeta(
            step=step,
            world_size=world.size,
            updates=num_updates(self.engine),
            zero_stage=self.config.zero.stage,
            precision=self.config.training.precision,
            vocab_size=self.data.codec.vocab_size,
            text_format=self.data.text_format.to_dict(),
            data_fingerprint=self.data.fingerprint,
            config=self.config.model_dump(mode="json"),
            val_loss=val_loss,
            versions=library_versions(),
            files={},
            on_examples=self.data.data_sets[0].manifest.row_tokens is not None,
            start=self.watchdog.fence.start_id,
            order_version=ORDER_VERSION,
            branch=self.data.branch,
            imported=self.imported,
        )


def batch_arithmetic(run: Run, world: World) -> str:
    """Sizes of model, step and run, in three lines."""
    config, data = run.config, run.data
    compiled = "" if run.compiler is None else " compiled"
    tokens_per_step = config.batch.global_batch_rows * config.batch.context_tokens
    num_tokens = data.total_steps * tokens_per_step
    if data.branch is not None:
        num_tokens = data.branch.tokens_at(data.total_steps, tokens_per_step)
    uses = data.mixed.uses
    documents = data.describe_documents()
    size = f"{data.num_tokens:,} tokens"
    if documents:  # more or fewer than an epoch reads
        size = f"{data.streams[0].table.rows_per_epoch:,} rows"
    amount = f"{uses[0].epochs:.2f} epochs of {size}"
    if len(uses) > 1:
        amount = f"{len(uses)} data sets"
    lines = "".join(f"\n  {use.shown()}" for use in uses) if len(uses) > 1 else ""
    if data.mixed.end_reason is not None:
        lines += f"\n  the run ends early: {data.mixed.end_reason}"
    trained = ""
    if (adapters := config.finetune.adapters) is not None:
        number = num_trained(config.model, adapters)
        trained = f" ({number:,} of them trained: LoRA of rank {adapters.rank})"
    return (
        f"{run.num_parameters:,} parameters{trained}, vocabulary {data.codec.vocab_size:,}, "
        f"writing {data.text_format.directions.value} by {data.text_format.unit.value}; attention "
        f"{run.attention}, {config.training.precision}{compiled}, ZeRO stage {config.zero.stage}, "
        f"{world.device.type}\n"
        f"step: {data.micro_batch_rows} rows x {config.batch.context_tokens} tokens x "
        f"{config.batch.shown_ranks(world.size)} x {data.accumulation_steps} accumulation = "
        f"{tokens_per_step:,} tokens"
        f"\n{data.total_steps:,} steps = {num_tokens:,} tokens = "
        f"{amount}, in {data.num_lanes} lanes{lines}" + "".join(f"\n{line}" for line in documents)
    )
