"""Training steps of a rank on batches in memory, through the engine as in a run."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_test.bench import Bench
from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from launcher.ranks.local import rank_environment, rank_names
from megaback.checkpoints.state import load_weights, refresh_copies
from megaback.config import Config
from megaback.distributed.engine import set_learning_rates, start_engine, take_step
from megaback.distributed.gradients import count_micro_batch, reducing_gradients
from megaback.distributed.world import World, start_world
from megaback.model.attention_choice import Attention, choose_attention
from megaback.model.compiler import GraphCounter
from megaback.model.gpt import ReverseGPT
from megaback.model.mup import initial_weights
from megaback.training.device_batches import DeviceBatches
from megaback.training.validation import to_device

TIMEOUT_S = 600.0


def alone(bench: Bench) -> World:
    """The world of one rank on the bench's device."""
    if torch.distributed.is_initialized():
        control = torch.distributed.new_group(backend="gloo")
        return World(0, 1, bench.device, control)
    os.environ |= rank_environment(1) | rank_names(1)[0]
    return start_world(bench.device.type, TIMEOUT_S)


def config_of(fields: dict[str, Any], bench: Bench) -> Config:
    """A config of one rank, whose data and run are not used."""
    return Config.model_validate(
        {
            "run": "unused",
            "data": {"shards": "unused"},
            **fields,
            "hardware": {"device": bench.device.type, **fields.get("hardware", {})},
        }
    )


def synthetic_batches(
    rows: int, context_tokens: int, vocab_size: int, number: int, seed: int = 0
) -> list[Batch]:
    """Micro-batches of random ids, packed with documents of 1 to 4 contexts' tokens and shorter.

    As in real rows, most documents are short and a few fill their row.
    """
    generator = np.random.default_rng(seed)
    batches = []
    for _ in range(number):
        edges = [0]
        for row in range(rows):
            begin = row * context_tokens
            place = 0
            while place < context_tokens:
                place += int(min(generator.lognormal(5.6, 1.1), 4 * context_tokens)) + 1
                edges.append(begin + min(place, context_tokens))
        ids_T = generator.integers(vocab_size, size=rows * context_tokens)
        targets_T = generator.integers(vocab_size, size=rows * context_tokens)
        cu_seqlens = np.array(edges, dtype=np.int32)
        targets_T[cu_seqlens[1:] - 1] = IGNORED_TARGET
        num_targets = int((targets_T != IGNORED_TARGET).sum())
        batches.append(
            Batch(
                ids_T=ids_T,
                targets_T=targets_T,
                cu_seqlens=cu_seqlens,
                num_targets=num_targets,
                num_skipped_rows=0,
            )
        )
    return batches


def attended_tokens_of(batches: Iterable[Batch]) -> float:
    """Mean number of tokens that a token attends to."""
    lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches]).astype(np.float64)
    return float((lengths * (lengths + 1)).sum() / 2 / lengths.sum())


@dataclass
class Stepper:
    """A model in an engine, and the steps of a run."""

    config: Config
    world: World
    engine: Any
    attention: Attention
    compiler: GraphCounter | None
    accumulation_steps: int
    num_parameters: int
    batches: DeviceBatches = field(init=False)

    def __post_init__(self) -> None:
        self.batches = DeviceBatches(
            self.world.device,
            lambda batch: to_device(
                batch,
                self.world.device,
                self.config.batch.context_tokens,
                is_compiled=self.compiler is not None,
            ),
        )

    @classmethod
    def start(cls, config: Config, world: World, vocab_size: int, *, compiled: bool) -> "Stepper":
        """An engine with the initial weights of a run of this config."""
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        attention = choose_attention(
            config.hardware.attention, world.device, dtype, config.model.head_size
        )
        # Weights are replaced; on a GPU they are made faster.
        with world.device:
            model = ReverseGPT(
                config.model,
                vocab_size,
                attention.backend,
                config.training.activation_checkpointing,
                config.optimizer.z_loss,
                config.training.loss_chunk_tokens,
            )
        rows = config.batch.micro_batch_rows
        assert rows is not None
        accumulation_steps = config.batch.global_batch_rows // (rows * world.size)
        compiler = GraphCounter() if compiled else None
        if compiler is not None and not attention.is_traceable:
            model.exclude_attention_from_compile()
        num_parameters, shapes = model.num_parameters(), model.shapes()
        engine = start_engine(model, config, rows, accumulation_steps, compiler)
        weights = initial_weights(config.model, shapes, config.training.seed)
        load_weights(engine, weights)
        refresh_copies(engine)
        engine.train()
        return cls(config, world, engine, attention, compiler, accumulation_steps, num_parameters)

    def step(self, micro_batches: Sequence[Batch], following: Sequence[Batch] = ()) -> torch.Tensor:
        """One step at the peak learning rate, as `Trainer` takes it; the sum of the losses."""
        num_targets = sum(batch.num_targets for batch in micro_batches)
        if self.world.size > 1:
            num_targets = int(self.world.sum(num_targets)[0])
        share = self.world.size * self.accumulation_steps / num_targets
        nats = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with reducing_gradients(self.engine):
            for batch, arguments in self.batches.take(micro_batches, following):
                loss = self.engine(*arguments).sum()
                nats += loss.detach()
                self.engine.backward(loss * share)
                if batch is not micro_batches[-1]:
                    count_micro_batch(self.engine)
        set_learning_rates(self.engine, 1.0)
        take_step(self.engine, lambda _norm: None)
        return nats / num_targets

    def close(self) -> None:
        """Release the engine's memory; it cannot be used after this."""
        self.engine.destroy()
        self.engine = None
        torch._dynamo.reset()
