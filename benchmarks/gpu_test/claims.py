"""Lines of docs/unverified.md, and which checks are about each."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_test.results import Check, PartResult

ATTENTION = "`hardware.attention`"
COMPILE = "`training.compile`"
DETERMINISTIC = "`training.deterministic`"
NCCL = "NCCL"
BATCHES = "Batches"
CONFIGS = "`configs/reverse_{1b,2b,7b}.yaml`"
OFFLOAD = "`zero.offload`"
OVERLAP = "`zero.overlap_communication`"
SAVING = "Saving"
PEAK_FLOPS = "The peak FLOP/s of devices"
PLAN = "`megaback plan`"
LOSS_CHUNKS = "`training.loss_chunk_tokens`"
OUT_OF_MEMORY = "A GPU without memory (54)"
MEMORY_CHECK = "`hardware.memory_check`"
REHEARSE = "`megaback rehearse --device cuda`"
DEVICES = "Counting devices"
PREFLIGHT = "Preflight"
LOST_RANK = "A lost rank"
SAMPLE = "`megaback sample`, `serve` and `score`"
GRAPHS = "CUDA graphs"
SCORES = "Scores in bfloat16"
CLAIMS = (
    GRAPHS,
    SCORES,
    ATTENTION,
    COMPILE,
    DETERMINISTIC,
    NCCL,
    BATCHES,
    CONFIGS,
    OFFLOAD,
    OVERLAP,
    SAVING,
    PEAK_FLOPS,
    PLAN,
    LOSS_CHUNKS,
    OUT_OF_MEMORY,
    MEMORY_CHECK,
    REHEARSE,
    DEVICES,
    PREFLIGHT,
    LOST_RANK,
    SAMPLE,
)
"""Starts of the lines that checks are about."""
_PAGE = Path(__file__).parents[2] / "docs" / "unverified.md"


def unverified_lines() -> list[str]:
    """The lines of docs/unverified.md, each whole: what was tried, and what is left."""
    text = _PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    items = re.findall(r"^- (.+(?:\n  .+)*)", text, re.MULTILINE)
    return [" ".join(item.split()) for item in items]


def line_of(claim: str) -> str:
    """The whole line that starts with a claim; the claim itself where there is none."""
    return next((line for line in unverified_lines() if line.startswith(claim)), claim)


def by_claim(parts: Iterable[PartResult]) -> dict[str, list[tuple[PartResult, Check]]]:
    """The checks about each claim."""
    found: dict[str, list[tuple[PartResult, Check]]] = {}
    for part in parts:
        for check in part.checks:
            if check.claim is not None:
                found.setdefault(check.claim, []).append((part, check))
    return found


def verdict(checks: Iterable[tuple[PartResult, Check]]) -> str:
    """Advice to a maintainer about a line with these checks."""
    checks = list(checks)
    statuses = [check.status for _, check in checks]
    if "failed" in statuses:
        return "FAILED"
    if any(part.device == "cpu" for part, _ in checks):
        return "ran on a CPU, and wants a GPU"
    ran = [status for status in statuses if status != "skipped"]
    if not ran:
        return "did not run"
    if len(ran) < len(statuses):
        return "confirmed in part: strike what the checks below name, and keep what was skipped"
    return "confirmed: strike what the checks below name"
