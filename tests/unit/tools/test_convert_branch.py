"""`megaback convert` of a branch: its trunk, and the data of each part, in every format."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.text.codec import TextCodec
from megaback.branches import BranchPoint
from megaback.run_folder import META_NAME
from megaback.weights.model_folder import read_description
from tests.helpers.exports import write_checkpoint
from tools.artifacts import inspect
from tools.convert import main as convert_command

TRUNK = BranchPoint(
    checkpoint="runs/trunk/checkpoints/step-00000005",
    sha256="1" * 64,
    trunk_step=5,
    kept=("weights", "optimizer"),
    step=0,
    tokens=0,
    rows=0,
    order_rows=4,
    data_fingerprint="2" * 64,
    text_format={},
    data="data/web; fingerprint 2222",
)


@pytest.fixture
def run(tmp_path: Path, codec: Callable[..., TextCodec]) -> Path:
    """A branch with a checkpoint."""
    shards = Path("data/books")
    target, _ = write_checkpoint(tmp_path / "run", codec(), seed=1, shards=shards)
    fields = json.loads((target / META_NAME).read_text())
    fields |= {"branch": asdict(TRUNK), "data_fingerprint": "3333"}
    (target / META_NAME).write_text(json.dumps(fields))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", ["full", "hf", "gguf"])
def test_every_format_names_the_trunk_what_was_kept_and_the_data_of_each_part(
    kind: str, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    result = CliRunner().invoke(convert_command, [str(run), "--to", kind, "--out", str(out)])
    assert result.exit_code == 0, result.output

    text = (out / ("config.json" if kind == "full" else "README.md")).read_text()
    for fact in (TRUNK.checkpoint, TRUNK.sha256, str(TRUNK.data), "data/books; fingerprint 3333"):
        assert fact in text
    if kind != "full":
        assert "It continues (weights, optimizer) the checkpoint:" in text
    if kind != "gguf":
        branch = read_description(out).branch
        assert branch is not None
        assert (branch.trunk.step, branch.kept) == (5, TRUNK.kept)
        assert inspect(out, verify=False).facts["branch_from"] == TRUNK.description


def test_an_average_names_the_data_of_its_parts_and_the_trunk_of_the_last(
    run: Path, codec: Callable[..., TextCodec], tmp_path: Path
) -> None:
    other, _ = write_checkpoint(tmp_path / "other", codec(), seed=2, shards=Path("data/news"))
    words = [str(other), str(run), "--average", "--no-val-loss", "--to", "hf"]
    result = CliRunner().invoke(convert_command, [*words, "--out", str(tmp_path / "mean")])
    assert result.exit_code == 0, result.output

    card = (tmp_path / "mean/README.md").read_text()
    assert "data `data/news`" in card
    assert "data `data/books; fingerprint 3333`" in card
    assert "The last of these is of a branch. It continues (weights, optimizer)" in card
