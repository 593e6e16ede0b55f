"""The report, as JSON and as Markdown, rewritten after each part."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_test.claims import by_claim, line_of, unverified_lines, verdict
from benchmarks.gpu_test.registry import PARTS
from benchmarks.gpu_test.results import Check, PartResult
from data_pipeline.common.atomic import write_text

JSON_NAME = "report.json"
_MARKDOWN_NAME = "report.md"
_SAME = ("device", "devices", "torch", "megaback", "commit", "is_changed", "size")
"""Facts that all parts of a report share."""


def write_report(folder: Path, facts: Mapping[str, Any], results: Mapping[str, PartResult]) -> None:
    """Replace both files."""
    ordered = [results[part.name] for part in PARTS if part.name in results]
    fields = {"facts": dict(facts), "parts": [result.as_fields() for result in ordered]}
    write_text(folder / JSON_NAME, json.dumps(fields, indent=1) + "\n")
    write_text(folder / _MARKDOWN_NAME, as_markdown(facts, ordered))


def read_report(folder: Path) -> tuple[dict[str, Any], dict[str, PartResult]]:
    """Facts and results of an earlier report; empty ones without it."""
    path = folder / JSON_NAME
    if not path.exists():
        return {}, {}
    fields = json.loads(path.read_text(encoding="utf-8"))
    results = [PartResult.of_fields(part) for part in fields["parts"]]
    return fields["facts"], {result.name: result for result in results}


def differing_facts(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Facts for which results of both cannot be in one report."""
    return [name for name in _SAME if earlier.get(name) != now.get(name)]


def as_markdown(facts: Mapping[str, Any], results: Sequence[PartResult]) -> str:
    lines = ["# GPU test", "", *_machine(facts), "", *_summary(results)]
    for result in results:
        lines += ["", f"## {result.name}: {result.title}", ""]
        if result.detail:
            lines += [f"**{result.detail}**", ""]
        if result.checks:
            lines += ["| | check | figures | bound or reason |", "|---|---|---|---|"]
            lines += [_row(check) for check in result.checks]
    lines += ["", "## Lines of docs/unverified.md", ""]
    claims = by_claim(results)
    for claim, checks in claims.items():
        lines += [f"- **{verdict(checks)}**: {line_of(claim)}"]
        lines += [
            f"    - {check.status}: {part.name}, {check.name}"
            + (f" ({check.detail})" if check.status in ("failed", "skipped") else "")
            for part, check in checks
        ]
    others = [line for line in unverified_lines() if not line.startswith(tuple(claims))]
    lines += ["", "No check was about these:", "", *(f"- {line}" for line in others)]
    return "\n".join(lines) + "\n"


def _machine(facts: Mapping[str, Any]) -> list[str]:
    devices = ", ".join(
        f"{one['name']} ({one['memory_bytes'] / 1e9:.0f} GB, compute capability "
        f"{one['compute_capability']})"
        for one in facts["devices"]
    )
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items() if found)
    revision = facts.get("commit", "without git")
    changed = " with changes" if facts.get("is_changed") else ""
    return [
        f"- devices: {devices or 'a CPU; nothing below was measured on a GPU'}",
        *(f"- nvidia-smi: {line}" for line in facts["nvidia_smi"]),
        f"- torch {facts['torch']}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, NCCL "
        f"{facts['nccl']}, Python {facts['python']}, {packages}",
        f"- {facts['system']}, {facts['cores']} cores",
        f"- megaback {facts['megaback']}, revision {revision}{changed}; sizes: {facts['size']}; "
        f"{facts['started']}",
    ]


def _summary(results: Sequence[PartResult]) -> list[str]:
    lines = ["| part | status | passed | failed | skipped | measured | seconds |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for result in results:
        statuses = [check.status for check in result.checks]
        counts = " | ".join(
            str(statuses.count(status)) for status in ("passed", "failed", "skipped", "measured")
        )
        status = f"**{result.status}**" if result.status == "failed" else result.status
        lines.append(f"| {result.name} | {status} | {counts} | {result.seconds:.0f} |")
    return lines


def _row(check: Check) -> str:
    figures = ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
        for name, value in check.figures.items()
        if value is not None
    )
    status = f"**{check.status}**" if check.status == "failed" else check.status
    cells = (status, check.name, figures, check.detail)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
