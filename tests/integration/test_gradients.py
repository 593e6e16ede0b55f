"""Gradients that the optimizer gets, against exact sums over 16 micro-batches and 2 ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import tiny_config, training_environment

pytestmark = pytest.mark.slow

ONCE = "zero.reduce_once=true"
REDUCE = "zero.reduction=reduce"
OVERLAP = "zero.overlap_communication=true"
OFFLOAD = "zero.offload=optimizer"
MUON = "optimizer.name=muon"
FP32 = "zero.gradient_precision=fp32"
_OPTIONS = [
    (1, ()),
    (1, (OVERLAP, REDUCE)),
    (1, (OFFLOAD,)),
    (1, (MUON,)),
    (2, ()),
    (2, (ONCE,)),
    (2, (OVERLAP, REDUCE)),
    (2, (OFFLOAD, ONCE)),
    (2, (MUON, ONCE)),
    (3, ()),
    (3, (ONCE,)),
    (3, (OFFLOAD, ONCE)),
    (3, (MUON, ONCE)),
]
FP32_CASES = [[f"zero.stage={stage}", FP32, *options] for stage, options in _OPTIONS]
BF16_CASES = [["zero.stage=1"], ["zero.stage=2", ONCE], ["zero.stage=3"]]
WHOLE_CASES = [[f"zero.stage={stage}", "training.precision=fp32", ONCE] for stage in (2, 3)]


@pytest.fixture(scope="module")
def errors_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path
) -> dict[str, list[float]]:
    """Relative errors of gradient and norm, by overrides."""
    fields = tiny_config(tiny_shards)
    fields["batch"] = {"context_tokens": 16, "global_batch_rows": 32, "micro_batch_rows": 1}
    fields["optimizer"]["gradient_clip"] = 0
    fields["training"]["precision"] = "bf16"
    config = tmp_path_factory.mktemp("gradients") / "config.yaml"
    config.write_text(yaml.safe_dump(fields))
    cases = [*FP32_CASES, *BF16_CASES, *WHOLE_CASES]

    ranks = subprocess.run(
        [sys.executable, "-m", "tests.helpers.gradient_worker", "2", config, json.dumps(cases)],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=400,
    )

    assert ranks.returncode == 0, ranks.stderr
    lines = [json.loads(line) for line in ranks.stdout.splitlines() if line.startswith("[")]
    return {" ".join(case): line for case, line in zip(cases, lines, strict=True)}


@pytest.mark.parametrize("case", [*FP32_CASES, *WHOLE_CASES], ids=" ".join)
def test_gradients_in_fp32_are_the_exact_sums(
    case: list[str], errors_of: dict[str, list[float]]
) -> None:
    of_gradient, of_norm = errors_of[" ".join(case)]

    assert of_gradient < 1e-5
    assert of_norm < 1e-5


@pytest.mark.parametrize("case", BF16_CASES, ids=" ".join)
def test_gradients_in_bf16_are_not(case: list[str], errors_of: dict[str, list[float]]) -> None:
    of_gradient, _ = errors_of[" ".join(case)]

    assert 1e-3 < of_gradient < 2e-2
