"""Collectives of LoRA: planned, and of a rehearsed rank of 8."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.text.codec import TextCodec
from launcher.rehearse import planned_bytes
from megaback.config import Config, ModelSection
from megaback.model.gpt import ReverseGPT
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import plan_run
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Job, rehearsal_config, rehearse
from megaback.rehearsal.report import RankReport
from tests.helpers.models import write_model

pytestmark = pytest.mark.slow

RANKS, RANK = 8, 5
SHAPE = {"num_layers": 2, "width": 512, "num_heads": 4}
ALL = {"rank": 4, "target_modules": "all-linear"}
LARGE = {"rank": 400, "target_modules": ["k_proj", "down_proj"]}
"""Factors larger than a bucket."""
CASES: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "1": ({"stage": 1}, {"rank": 4}, "none"),
    "2": ({"stage": 2}, LARGE, "none"),
    "3": ({"stage": 3}, ALL, "none"),
    "3 block": ({"stage": 3}, {"rank": 4}, "block"),
    "3 by node": ({"stage": 3, "hierarchical": True}, ALL, "none"),
}
_FEW_BYTES = 1_000
"""Bytes of norms and counters."""


@pytest.fixture(scope="module")
def configs(
    tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, codec: Callable[..., TextCodec]
) -> dict[str, Config]:
    """Runs in bf16 with three micro-batches per step."""
    model = ReverseGPT(ModelSection.model_validate(SHAPE).resolved(), codec().vocab_size)
    base = write_model(tmp_path_factory.mktemp("base") / "base", model, codec())

    def config_of(zero: dict[str, object], lora: dict[str, object], checkpointing: str) -> Config:
        fields = {
            "run": "unused",
            "init_from": str(base),
            "data": {"shards": str(tiny_shards)},
            "model": SHAPE,
            "batch": {"context_tokens": 64, "global_batch_rows": 3 * RANKS, "micro_batch_rows": 1},
            "optimizer": {"learning_rate": 1e-3},
            "finetune": {"lora": lora},
            "training": {
                "steps": 100,
                "precision": "bf16",
                "activation_checkpointing": checkpointing,
            },
            "zero": zero,
        }
        return rehearsal_config(Config.model_validate(fields), 2, None)

    return {name: config_of(*case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def reports(configs: dict[str, Config]) -> dict[str, RankReport]:
    jobs = [Job(config, (RANK,), RANKS, _per_node(config), True) for config in configs.values()]
    found = dict(zip(configs, rehearse(*jobs), strict=True))
    assert all(isinstance(report, RankReport) for report in found.values())
    return found


def _per_node(config: Config) -> int:
    return RANKS // 2 if config.zero.hierarchical else RANKS


@pytest.mark.parametrize("case", CASES)
def test_collectives_of_lora_are_those_of_the_plan(
    case: str, configs: dict[str, Config], reports: dict[str, RankReport]
) -> None:
    config, per_node = configs[case], _per_node(configs[case])
    cluster = Cluster(RANKS // per_node, per_node, cpu_device(1.0, None))

    plan = plan_run(config, run_facts(config, None, None), cluster, 0.4, RANK)

    counted = [one for one in reports[case].traffic if one.group != "control"]
    calls = {(one.group, one.kind): one.calls for one in counted}
    assert calls == plan.calls.by_group(plan.traffic)
    sent = {(one.group, one.kind): one.sent_bytes for one in counted}
    planned = dict.fromkeys(sent, 0.0) | planned_bytes(plan)
    assert sent == pytest.approx(planned, rel=1e-3, abs=_FEW_BYTES)
