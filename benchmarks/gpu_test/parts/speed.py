"""Tokens/s and MFU of training steps with each backend, compiled and not, on batches in memory."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import yaml

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import ATTENTION, COMPILE, CONFIGS, PEAK_FLOPS, PLAN
from benchmarks.gpu_test.runs import ROOT
from benchmarks.gpu_test.training import (
    Stepper,
    alone,
    attended_tokens_of,
    config_of,
    synthetic_batches,
)
from benchmarks.gpu_test.waiting import counted_waits
from megaback.config import Config
from megaback.distributed.device_limits import device_peak_flops
from megaback.distributed.world import World
from megaback.model.attention_choice import why_unusable
from megaback.model.compiler import why_not_compiled
from megaback.model.flash_attention import KERNELS
from megaback.planning.flops import flops_per_token
from megaback.planning.memory_room import planned_memory
from megaback.rehearsal.memory_meter import MemoryMeter

_WARMUP_STEPS = 3
_MEMORY_SHARE = 0.85
"""Largest part of a device's memory that a measured setting is planned to take."""


@dataclass(frozen=True)
class Shape:
    """The model and batch of a shipped config."""

    name: str
    config: str
    vocab_size: int
    small: dict[str, Any]
    """Model where the whole one would take too long."""
    small_compiled: tuple[bool, ...] = (False,)
    """Whether that one is compiled."""


XCOAX = Shape(
    "xcoax_100bt", "xcoax_100bt.yaml", 8_888, {"num_layers": 2, "width": 128}, (False, True)
)
BILLION = Shape("reverse_1b", "reverse_1b.yaml", 32_000, {"num_layers": 2, "width": 128})


def run(bench: Bench) -> None:
    """The shape of xcoax_100bt."""
    measure_shape(bench, XCOAX)


def measure_shape(bench: Bench, shape: Shape) -> None:
    world = alone(bench)
    usable, head_dim = [], _config(bench, shape, "auto").model.head_size
    for kernel in KERNELS:
        reason = why_unusable(kernel, bench.device, torch.bfloat16, head_dim)
        if reason is None:
            usable.append(kernel.name)
        else:
            bench.skip(f"{shape.name}, {kernel.name}", reason, ATTENTION)
    for attention in (*usable, "sdpa"):
        # Compiling may take all the time that is left.
        for compiled in bench.sized((False, True), shape.small_compiled, (False,)):
            kind = "compiled" if compiled else "not compiled"
            name = f"{shape.name}, {attention}, {kind}"
            with bench.attempt(name, COMPILE if compiled else ATTENTION):
                _measure(bench, world, shape, name, attention, compiled=compiled)


def _config(bench: Bench, shape: Shape, attention: str, **training: Any) -> Config:
    fields = yaml.safe_load((ROOT / "configs" / shape.config).read_text(encoding="utf-8"))
    if bench.size != "full":
        fields["model"] |= {**shape.small, "num_heads": 2, "num_kv_heads": 1, "mlp_width": None}
        fields["batch"] = {"context_tokens": bench.sized(0, 128, 32), "micro_batch_rows": 4}
    fields["batch"]["global_batch_rows"] = fields["batch"]["micro_batch_rows"]
    fields["training"] |= {"steps": 100, "epochs": None, **training}
    fields["hardware"] = {"attention": attention}
    return config_of(
        {
            key: fields[key]
            for key in ("model", "batch", "optimizer", "training", "zero", "hardware")
        },
        bench,
    )


def fitting(config: Config, bench: Bench, vocab_size: int) -> Config:
    """The config with as many rows per micro-batch as the device's memory has room for."""
    if bench.device.type != "cuda":
        return config
    room = _MEMORY_SHARE * torch.cuda.get_device_properties(bench.device).total_memory
    rows = config.batch.micro_batch_rows or 1
    while rows > 1 and planned_memory(config, vocab_size, 1, "cuda").parts.total > room:
        rows //= 2
        batch = {"micro_batch_rows": rows, "global_batch_rows": rows}
        config = config.model_copy(update={"batch": config.batch.model_copy(update=batch)})
    return config


def _measure(
    bench: Bench, world: World, shape: Shape, name: str, attention: str, *, compiled: bool
) -> None:
    config = fitting(_config(bench, shape, attention), bench, shape.vocab_size)
    rows, context_tokens = config.batch.micro_batch_rows or 1, config.batch.context_tokens
    steps = bench.sized(6, 3, 1)
    batches = synthetic_batches(rows, context_tokens, shape.vocab_size, _WARMUP_STEPS + steps + 2)
    bench.release()
    memory = MemoryMeter.of(bench.device)
    stepper = Stepper.start(config, world, shape.vocab_size, compiled=compiled)
    if compiled:
        training = config.training.model_copy(update={"compile": "on"})
        why_not_compiled(training, config.zero.stage, bench.device.type, stepper.attention)
    started = perf_counter()
    stepper.step(batches[:1], batches[1:])
    bench.meter.wait()
    first_step_s = perf_counter() - started
    for number in range(1, _WARMUP_STEPS):
        stepper.step(batches[number : number + 1], batches[number + 1 :])
    bench.meter.wait()
    graphs = 0 if stepper.compiler is None else stepper.compiler.num_graphs
    measured = batches[_WARMUP_STEPS:]
    started = perf_counter()
    for number in range(steps):
        stepper.step(measured[number : number + 1], measured[number + 1 :])
    bench.meter.wait()
    step_s = (perf_counter() - started) / steps
    with counted_waits(bench.device) as waits:
        stepper.step(measured[steps : steps + 1], measured[steps + 1 :])
    bench.meter.wait()
    new_graphs = 0 if stepper.compiler is None else stepper.compiler.num_graphs - graphs
    step_tokens = rows * context_tokens
    attended = attended_tokens_of(measured[:steps])
    flops = flops_per_token(config.model, shape.vocab_size, attended) * step_tokens
    peak_flops = device_peak_flops(bench.device, config.training.precision)
    bench.measured(
        name,
        CONFIGS if shape is BILLION else ATTENTION,
        parameters=stepper.num_parameters,
        micro_batch_rows=rows,
        tokens_per_s=step_tokens / step_s,
        mfu=flops / step_s / peak_flops if peak_flops else None,
        step_s=step_s,
        first_step_s=first_step_s,
        graphs=graphs,
        host_waits=len(waits) if bench.is_gpu else None,
    )
    planned = planned_memory(config, shape.vocab_size, 1, bench.device.type)
    bench.measured(
        f"{name}: memory",
        PLAN,
        measured_bytes=memory.peak_bytes(),
        planned_bytes=int(planned.parts.total - planned.parts.reserve),
    )
    if bench.device.type == "cuda":
        bench.require(
            f"{name}: peak FLOP/s",
            peak_flops is not None,
            f"{torch.cuda.get_device_name(bench.device)} is known",
            PEAK_FLOPS,
            peak_flops=peak_flops,
        )
    if compiled:
        bench.require(
            f"{name}: recompilations",
            new_graphs == 0,
            f"none in {steps + 1} steps after {_WARMUP_STEPS}",
            COMPILE,
            recompilations=new_graphs,
        )
    stepper.close()
