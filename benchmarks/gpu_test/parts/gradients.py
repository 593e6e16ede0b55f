"""Speed of gradients in fp32, and reduced once, against bf16 at ZeRO stage 2."""

from typing import Any

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import OVERLAP
from benchmarks.gpu_test.training import Stepper, alone, config_of, synthetic_batches
from megaback.distributed.world import World

_VOCAB_SIZE = 8_888
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("bf16", {}),
    ("fp32", {"gradient_precision": "fp32"}),
    ("fp32, reduced once", {"gradient_precision": "fp32", "reduce_once": True}),
)


def run(bench: Bench) -> None:
    world = alone(bench)
    for name, zero in _SETTINGS:
        title = f"gradients in {name}, ZeRO 2"
        with bench.attempt(title, OVERLAP):
            _measure(bench, world, title, zero)


def _measure(bench: Bench, world: World, title: str, zero: dict[str, Any]) -> None:
    rows, context_tokens = bench.sized(16, 2, 2), bench.sized(1024, 64, 32)
    config = config_of(
        {
            "model": bench.sized(
                {"num_layers": 12, "width": 1024, "num_heads": 16},
                {"num_layers": 2, "width": 64, "num_heads": 2},
                {"num_layers": 1, "width": 32, "num_heads": 2},
            ),
            "batch": {
                "context_tokens": context_tokens,
                "global_batch_rows": 4 * rows,
                "micro_batch_rows": rows,
            },
            "optimizer": {"learning_rate": 1e-4},
            "training": {"steps": 100, "precision": "bf16"},
            "zero": {"stage": 2, **zero},
        },
        bench,
    )
    batches = synthetic_batches(rows, context_tokens, _VOCAB_SIZE, 4)
    stepper = Stepper.start(config, world, _VOCAB_SIZE, compiled=False)
    stepper.step(batches)
    seconds = bench.seconds(lambda: stepper.step(batches), bench.sized(4, 2, 1))
    tokens = 4 * rows * context_tokens
    bench.measured(title, OVERLAP, step_s=seconds, tokens_per_s=tokens / seconds)
    stepper.close()
