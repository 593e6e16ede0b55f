"""From rows to a chat model: instruction shards, a base model, early stopping, chat."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import sequential_batches
from data_pipeline.loading.rows import RowReader
from data_pipeline.shards.data_set import DataSet
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.run_folder import complete_checkpoints
from megaback.training.validation import to_device
from megaback.weights.model_folder import load_model_folder
from tests.helpers.tiny_run import curve_of, metrics_of, val_losses_of
from tools.convert import convert

pytestmark = pytest.mark.slow

RunOf = Callable[..., Path]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

CONTEXT_TOKENS = 64


@pytest.fixture(scope="module")
def instruct_shards(
    tmp_path_factory: pytest.TempPathFactory,
    english_documents: list[str],
    codec: Callable[..., TextCodec],
) -> Path:
    """Sentences and their last words."""
    folder = tmp_path_factory.mktemp("instruct")
    sentences = [text.partition(".")[0] for text in english_documents]
    lines = [
        {"instruction": "What came last?", "input": sentence.split()[-1], "output": sentence}
        for sentence in sentences
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings(
        sources=(WeightedSource(str(source)),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0.2,
        frame_tokens=1024,
        examples=ExampleColumns(),
        row_tokens=CONTEXT_TOKENS,
    )
    build_shards(settings, codec(), folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def tuned(instruct_shards: Path, run_of: RunOf, lonely_run_of: RunOf) -> Path:
    """A run that starts from the tiny run's checkpoint and stops early."""
    return lonely_run_of(
        f"init_from={run_of('zero.stage=1')}",
        f"data.shards={instruct_shards}",
        "training.steps=null",
        "training.epochs=20",
        "optimizer.learning_rate=0.03",
        "optimizer.schedule=wsd",
        "validation.every_steps=4",
        "validation.patience=2",
        "checkpoint.every_steps=4",
    )


def test_a_run_starts_from_the_weights_of_a_runs_checkpoint_and_learns(
    tuned: Path, instruct_shards: Path, run_of: RunOf, model_of: Callable[[Path], Path]
) -> None:
    model, _, _ = load_model_folder(model_of(run_of("zero.stage=1")), torch.device("cpu"))
    frames = FrameStore(DataSet.open(instruct_shards), "val")
    rows = RowReader(frames, CONTEXT_TOKENS, Direction.BACKWARD)
    batches = list(sequential_batches(rows, 0, 1, 1))
    with torch.inference_mode():
        nats = sum(float(model(*to_device(batch, torch.device("cpu"))).sum()) for batch in batches)
    of_base = nats / sum(batch.num_targets for batch in batches)

    losses = val_losses_of(tuned)
    assert losses[0] == pytest.approx(of_base, abs=1e-4)
    assert min(losses.values()) < of_base / 2


def test_a_run_stops_early_and_keeps_its_best_checkpoint(tuned: Path) -> None:
    losses = val_losses_of(tuned)
    best = min(losses, key=losses.__getitem__)
    last = max(losses)
    assert last == best + 8 < 300
    assert len(curve_of(tuned)) == last
    assert find_checkpoint(tuned / "checkpoints" / "best")[1].step == best
    ending = json.loads((tuned / "exit.json").read_text())
    assert (ending["code"], ending["kind"]) == (0, "finished")
    assert ending["reason"].startswith("stopped early: val loss did not fall below")
    assert f"(step {best})" in ending["reason"]


def test_a_run_that_stopped_early_does_not_resume(
    tuned: Path, tmp_path: Path, train_again: Callable[[Path], str]
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    output = train_again(run)
    assert "stopped early" in output
    assert metrics_of(run) == metrics_of(tuned)


def test_a_resumed_run_stops_early_at_the_same_step(
    tuned: Path, tmp_path: Path, train_again: Callable[[Path], str]
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    newest = complete_checkpoints(run)[-1]
    shutil.rmtree(newest)
    (run / "checkpoints" / "best").write_text("step-00009999\n")  # as a kill may leave it
    train_again(run)
    assert metrics_of(run) == metrics_of(tuned)
    assert newest in complete_checkpoints(run)
    assert (run / "checkpoints" / "best").read_text() == (
        tuned / "checkpoints" / "best"
    ).read_text()


@pytest.fixture
def train_again(warm_ranks: Callable[..., object], tmp_path: Path) -> Callable[[Path], str]:
    """`train_again(run)`: train with the run's own config; returns the output."""

    def again(run: Path) -> str:
        output = tmp_path / "again.txt"
        warm_ranks(1).train(run / "config.yaml", (f"run={run}",), output)  # type: ignore[attr-defined]
        return output.read_text()

    return again


def test_a_fine_tuned_model_chats_through_a_pipe(
    tuned: Path, tmp_path: Path, run_megaback: Command
) -> None:
    convert(tuned / "checkpoints" / "best", tmp_path / "model", "full", "float32")
    lines = [{"response": "My younger sister painted the last map near the river", "n": 2}, 3]
    result = run_megaback(
        *("chat", tmp_path / "model", "--json", "--device", "cpu"),
        input="".join(json.dumps(line) + "\n" for line in lines),
    )
    answer, refused = map(json.loads, result.stdout.splitlines())
    assert answer["candidates"][0]["is_complete"]
    assert answer["instruction"].startswith("What came last?")
    assert refused["line"] == 2
    assert result.returncode == 23
    assert "1 of 2 lines" in result.stderr
