"""The figures at the end of `make demo`."""

import json
from pathlib import Path

import pytest

from tools.demo import show_figures

LINES = [
    {"step": 0, "val_loss": 7.65, "val_bits_per_byte": 3.4},
    {"step": 1, "loss": 7.5, "tokens_seen": 4_096_000, "step_s": 0.5},
    {"step": 2, "loss": 6.5, "tokens_seen": 8_192_000, "step_s": 0.3},
    {"step": 2, "val_loss": 3.25, "val_bits_per_byte": 1.5},
]


@pytest.mark.parametrize("columns", ["80", None])
def test_figures_fit_80_columns(
    tmp_path: Path,
    tiny_shards: Path,
    columns: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "shards").symlink_to(tiny_shards)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    if columns:
        monkeypatch.setenv("COLUMNS", columns)

    show_figures(tmp_path, 8.25)

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split("  ")[-1].strip() for line in lines[2:]] == [
        "7.650 nats/token, 3.400 bits/byte",
        "3.250 nats/token, 1.500 bits/byte",
        "8,192,000 tokens in 1 s of steps",
        "10,240,000 tokens/s",
        "8.2 minutes",
    ]
