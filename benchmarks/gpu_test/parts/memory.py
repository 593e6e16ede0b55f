"""Peak memory of a rank, measured by `megaback rehearse`, against `megaback plan`."""

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import MEMORY_CHECK, PLAN, REHEARSE
from benchmarks.gpu_test.runs import run_config
from data_pipeline.shards.data_set import DataSet
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.memory_room import certain_bytes, planned_memory
from megaback.rehearsal.job import Job, rehearsal_config, rehearse
from megaback.rehearsal.report import RankFailure

MAX_SHARE = 0.1
"""Maximum difference between plan and measurement, of the measured memory."""


def run(bench: Bench) -> None:
    configs = _configs(bench)
    jobs = [
        Job(rehearsal_config(config, 2, None, bench.device.type), (0,), 1, 1)  # type: ignore[arg-type]
        for config in configs.values()
    ]
    with bench.attempt("rehearsals", REHEARSE):
        for (name, config), report in zip(configs.items(), rehearse(*jobs), strict=True):
            if isinstance(report, RankFailure):
                bench.require(name, False, str(report.error), REHEARSE)
                continue
            _compare(bench, name, config, report.memory_training_bytes)
        bench.require(
            "rehearsals", True, f"{len(configs)} settings on {bench.device.type}", REHEARSE
        )


def _configs(bench: Bench) -> dict[str, Config]:
    """Settings of one shape: attention, checkpointing, stage, optimizer."""
    backends = ("auto", "sdpa") if bench.is_gpu else ("auto",)
    settings = [
        (attention, checkpointing, 1, "muon")
        for attention in backends
        for checkpointing in ("none", "selective", "block")
    ]
    settings += [("auto", "selective", stage, "adamw") for stage in (0, 2, 3)]
    settings = settings[: bench.sized(9, 4, 1)]
    rows = bench.sized(16, 2, 2)
    path = run_config(
        bench,
        bench.work / "memory",
        model=bench.sized(
            {"num_layers": 12, "width": 1024, "num_heads": 16, "num_kv_heads": None},
            {"num_layers": 4, "width": 256, "num_heads": 4, "num_kv_heads": None},
            {},
        ),
        batch={
            "context_tokens": bench.sized(1024, 256, 64),
            "global_batch_rows": 2 * rows,
            "micro_batch_rows": rows,
        },
    )
    return {
        f"{attention}, {checkpointing}, ZeRO {stage}, {optimizer}": load_config(
            path,
            (
                f"hardware.attention={attention}",
                f"training.activation_checkpointing={checkpointing}",
                f"zero.stage={stage}",
                f"optimizer.name={optimizer}",
            ),
        )
        for attention, checkpointing, stage, optimizer in settings
    }


def _compare(bench: Bench, name: str, config: Config, measured_bytes: int) -> None:
    vocab_size = DataSet.open(config.data.shards[0].path).manifest.vocab_size
    memory = planned_memory(config, vocab_size, 1, bench.device.type)
    moments = [size for moment, size in memory.moments.items() if moment != "saving"]
    planned_bytes = max(moments) - memory.parts.reserve
    figures = {
        "planned_bytes": int(planned_bytes),
        "measured_bytes": measured_bytes,
        "plan_is_off_percent": 100 * (planned_bytes / measured_bytes - 1),
    }
    if not bench.is_gpu:
        # Small models: the memory of libraries and of the process is a large part of it.
        bench.measured(name, PLAN, **figures)
        return
    bench.require(
        name,
        abs(planned_bytes / measured_bytes - 1) <= MAX_SHARE,
        f"the plan without its reserve is at most {MAX_SHARE:.0%} off",
        PLAN,
        **figures,
    )
    certain = certain_bytes(memory.parts, is_compiled=False)
    bench.require(
        f"{name}: check",
        certain <= measured_bytes,
        "what the memory check requires is at most what a run takes",
        MEMORY_CHECK,
        required_bytes=int(certain),
    )
