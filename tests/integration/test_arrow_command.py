"""`megaback arrow`: two real runs and their difference in loss; interrupted; refused inputs."""

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    PreemptedError,
    RunMismatchError,
    ShardsMissingError,
    SourceEmptyError,
)
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.weights.source import open_checkpoint
from tests.helpers.tiny_run import tiny_config, training_environment, val_losses_of, wait_for_step
from tools.arrow import main
from tools.artifacts import inspect

pytestmark = pytest.mark.slow

STEPS = 6
CONTEXT_TOKENS = 128
OPTIONS = (
    f"training.steps={STEPS}",
    "hardware.processes=1",
    "hardware.preflight=off",
    "validation.every_steps=null",
    f"batch.context_tokens={CONTEXT_TOKENS}",
    "optimizer.warmup_steps=2",
)
LADDER = ("--sizes", "32x1,32x2", "--budgets", STEPS * 8 * CONTEXT_TOKENS)


def start_arrow(config: Path, run: Path, output: Path, *options: object) -> "subprocess.Popen[str]":
    words = (config, f"run={run}", *OPTIONS, *options)
    with output.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "megaback", "arrow", *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            env=training_environment(),
        )


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, config_path: Path) -> tuple[Path, str]:
    """An uninterrupted `megaback arrow`, and its output."""
    folder = tmp_path_factory.mktemp("arrow")
    process = start_arrow(config_path, folder / "run", folder / "output.txt")
    assert process.wait(200) == 0, (folder / "output.txt").read_text()
    return folder / "run", (folder / "output.txt").read_text()


def found_in(run: Path) -> dict[str, Any]:
    """The result without its paths."""
    fields: dict[str, Any] = json.loads((run / "arrow.json").read_text())
    assert fields.pop("config")["run"] == str(run)
    return fields


def nats_of_documents(run: Path, shards: Path, *, is_turned: bool) -> tuple[float, int]:
    """Loss of a run's model on whole documents, one at a time, and the number of targets.

    Only for documents that fit the context, in stored order or, with `is_turned`, in the other.
    """
    source = open_checkpoint(run)
    model = ReverseGPT(source.description.shape, source.description.vocab_size)
    source.fill(model)
    manifest = Manifest.load(shards)
    exchanged = {manifest.begin_id: manifest.end_id, manifest.end_id: manifest.begin_id}
    nats, targets = 0.0, 0
    for entry in manifest.split("val"):
        with ShardReader(shards / entry.file) as reader:
            for stored in reader.documents():
                ids = stored.tolist()
                assert len(ids) <= CONTEXT_TOKENS + 1
                if is_turned:
                    ids = [exchanged.get(piece, piece) for piece in ids[::-1]]
                ids_T = torch.tensor(ids)
                read = len(ids) - 1
                with torch.no_grad():
                    nats_T = model.eval()(
                        ids_T[:-1],
                        ids_T[1:],
                        torch.arange(read),
                        Segments.from_lengths((read,), torch.device("cpu")),
                    )
                nats += float(nats_T.sum())
                targets += read
    return nats, targets


def test_the_losses_are_those_of_whole_documents_read_each_way(
    finished_run: tuple[Path, str], tiny_shards: Path
) -> None:
    run, _ = finished_run
    found = found_in(run)["whole"]

    for direction, is_turned in (("backward", False), ("forward", True)):
        nats, targets = nats_of_documents(
            run / "seed-3" / direction, tiny_shards, is_turned=is_turned
        )
        assert found["targets"] == targets
        assert found[direction] == pytest.approx(nats / targets, rel=1e-5)
    assert found["gap"] == pytest.approx(found["backward"] - found["forward"])
    assert found["gap_error"] > 0


def test_both_runs_start_alike_and_end_apart(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    forward, backward = (val_losses_of(run / "seed-3" / name) for name in ("forward", "backward"))

    assert list(forward) == list(backward) == [0, STEPS]
    assert forward[0] == pytest.approx(backward[0], abs=0.05)
    assert forward[STEPS] < forward[0] - 0.1
    assert forward[STEPS] != backward[STEPS]


def test_the_result_and_its_path_are_printed(finished_run: tuple[Path, str]) -> None:
    run, output = finished_run
    whole = found_in(run)["whole"]

    assert f"{abs(whole['gap']):.4f} +- {whole['gap_error']:.4f} nats/token" in output
    assert "--num-seeds 3" in output
    assert str(run / "arrow.json") in output
    assert (run / "arrow.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_arrow_resumes_to_the_same_result(
    finished_run: tuple[Path, str], config_path: Path, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "output.txt"
    process = start_arrow(config_path, run, output)
    wait_for_step(process, run / "seed-3" / "backward", 1, output)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) in (PreemptedError.exit_code, 0), output.read_text()

    again = start_arrow(config_path, run, output)

    assert again.wait(200) == 0, output.read_text()
    assert found_in(run) == found_in(finished_run[0])


def test_inspect_identifies_its_outputs(finished_run: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = finished_run
    whole = found_in(run)["whole"]

    for path in (run, run / "arrow.json"):
        found = inspect(path, verify=False)
        assert found.kind == "arrow of time"
        assert found.facts["gap"] == whole["gap"]
        assert found.facts["seeds"] == 1
        assert str(run / "seed-3" / "forward") in next(iter(found.next_lines))
    (tmp_path / "arrow.json").write_text((run / "arrow.json").read_text()[:100])
    with pytest.raises(CheckpointCorruptError, match="--measure-only"):
        inspect(tmp_path, verify=False)


def arrow(config: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, [str(config), *map(str, arguments)])


def assert_refused(result: Result, kind: type[MegabackError], *words: str) -> None:
    assert result.exit_code == kind.exit_code, result.output
    assert len(result.output.strip().splitlines()) == 1
    for word in words:
        assert word in result.output


@pytest.fixture
def copied_run(finished_run: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run[0], tmp_path / "run"))


def test_finished_runs_are_measured_without_training(copied_run: Path, config_path: Path) -> None:
    before = json.loads((copied_run / "arrow.json").read_text())
    (copied_run / "arrow.json").unlink()

    of_both = ("data.direction=both", "data.forward_share=0.4", "validation.direction=forward")
    result = arrow(config_path, f"run={copied_run}", *OPTIONS, "--measure-only", *of_both)

    assert result.exit_code == 0, result.output
    assert "ranks" not in result.output  # as training logs it
    assert found_in(copied_run)["whole"] == before["whole"]


def test_fewer_documents_are_spread_evenly(
    copied_run: Path, config_path: Path, tiny_shards: Path
) -> None:
    options = (f"run={copied_run}", *OPTIONS, "--measure-only", "--limit", 5)

    assert arrow(config_path, *options).exit_code == 0

    whole = found_in(copied_run)["whole"]
    lengths: list[int] = []
    for entry in Manifest.load(tiny_shards).split("val"):
        with ShardReader(tiny_shards / entry.file) as reader:
            lengths += reader.document_tokens().tolist()
    last_of_fifths = [math.ceil(part * len(lengths) / 5) - 1 for part in range(1, 6)]
    assert whole["documents"] == 5
    assert whole["targets"] == sum(lengths[place] - 1 for place in last_of_fifths)


def test_a_seed_measured_before_stays_in_the_result(copied_run: Path, config_path: Path) -> None:
    shutil.copytree(copied_run / "seed-3", copied_run / "seed-4")
    one = json.loads((copied_run / "arrow.json").read_text())["seeds"]
    options = (f"run={copied_run}", *OPTIONS, "training.seed=4", "--measure-only")

    assert arrow(config_path, *options).exit_code == 0

    both = found_in(copied_run)["seeds"]
    assert both == {**one, "4": one["3"]}
    shutil.rmtree(copied_run / "seed-3")
    assert_refused(
        arrow(config_path, *options), CheckpointMissingError, "seed 3", "is gone; restore it"
    )
    assert found_in(copied_run)["seeds"] == both


def rungs_of(run: Path) -> list[dict[str, Any]]:
    rungs: list[dict[str, Any]] = json.loads((run / "ladder.json").read_text())["rungs"]
    return rungs


def test_a_ladder_keeps_finished_runs_and_trains_the_others(
    finished_run: tuple[Path, str], config_path: Path, tmp_path: Path
) -> None:
    ladder, budget = tmp_path / "ladder", LADDER[-1]
    finished = Path(shutil.copytree(finished_run[0], ladder / f"32x2-{budget}"))
    options = (f"run={ladder}", *OPTIONS, *LADDER)

    partial = arrow(config_path, *options, "--measure-only")

    assert partial.exit_code == 0, partial.output
    assert f"not finished yet: 32x1-{budget};" in partial.output
    (rung,) = rungs_of(ladder)
    whole = found_in(finished_run[0])["whole"]
    assert {key: rung[key] for key in whole} == whole
    measured = (finished / "arrow.json").stat().st_mtime_ns

    output = tmp_path / "output.txt"
    process = start_arrow(config_path, ladder, output, *LADDER)

    assert process.wait(200) == 0, output.read_text()
    small, large = rungs_of(ladder)
    assert (small["size"], large) == ("32x1", rung)
    assert small["parameters"] < large["parameters"]
    assert small["tokens"] == large["tokens"] == budget
    assert str(finished / "seed-3") not in output.read_text()  # not started again
    assert (finished / "arrow.json").stat().st_mtime_ns == measured  # nor measured again
    assert (ladder / "ladder.png").read_bytes().startswith(b"\x89PNG")

    other = arrow(config_path, *options, "--measure-only", "optimizer.learning_rate=0.1")
    assert_refused(other, RunMismatchError, "optimizer.learning_rate = 0.003", "config has 0.1")

    narrower = (f"run={ladder}", *OPTIONS, "--sizes", "32x1", *LADDER[2:], "--measure-only")
    shutil.rmtree(finished / "seed-3")
    for limit in (2000, 5):
        assert arrow(config_path, *narrower, "--limit", limit).exit_code == 0
        first, kept = rungs_of(ladder)
        assert kept == large  # with the documents that it was measured on, also without its runs
        assert first["max_documents"] == limit


def test_a_ladder_needs_sizes_and_budgets(config_path: Path, tmp_path: Path) -> None:
    run = f"run={tmp_path / 'run'}"

    assert_refused(arrow(config_path, run, *LADDER[:2]), ConfigError, "--sizes and --budgets")
    assert_refused(
        arrow(config_path, run, *OPTIONS, *LADDER, "--measure-only"),
        CheckpointMissingError,
        "is finished; train them, without --measure-only",
    )
    assert not (tmp_path / "run").exists()


def test_missing_runs_are_refused(config_path: Path, tmp_path: Path) -> None:
    result = arrow(config_path, f"run={tmp_path / 'none'}", *OPTIONS, "--measure-only")

    assert_refused(result, CheckpointMissingError, "seed-3/forward")
    assert not (tmp_path / "none").exists()


def test_a_model_of_the_other_direction_is_refused(copied_run: Path, config_path: Path) -> None:
    shutil.rmtree(copied_run / "seed-3" / "forward")
    shutil.copytree(copied_run / "seed-3" / "backward", copied_run / "seed-3" / "forward")

    result = arrow(config_path, f"run={copied_run}", *OPTIONS, "--measure-only")

    assert_refused(result, DirectionMismatchError, "writes backward", "seed-3/forward")


def test_runs_of_another_config_are_refused_and_their_result_is_kept(
    copied_run: Path, config_path: Path
) -> None:
    before = (copied_run / "arrow.json").read_bytes()

    options = (f"run={copied_run}", *OPTIONS, "--measure-only", "model.num_layers=5")

    assert_refused(
        arrow(config_path, *options), RunMismatchError, "model.num_layers = 2", "config has 5"
    )
    assert (copied_run / "arrow.json").read_bytes() == before


def test_runs_of_unequal_length_are_not_compared(copied_run: Path, config_path: Path) -> None:
    meta = next((copied_run / "seed-3" / "backward").glob("checkpoints/step-*/meta.json"))
    fields = json.loads(meta.read_text())
    meta.write_text(json.dumps({**fields, "step": STEPS - 1}))
    meta.parent.rename(meta.parent.with_name(f"step-{STEPS - 1:08d}"))

    result = arrow(config_path, f"run={copied_run}", *OPTIONS, "--measure-only")

    assert_refused(result, RunMismatchError, "step = 6", "has 5")


@pytest.mark.parametrize(
    ("override", "kind", "words"),
    [
        ("init_from=elsewhere", ConfigError, ("init_from", "one direction")),
        ("validation={every_steps: 1, patience: 2}", ConfigError, ("validation.patience",)),
    ],
    ids=["init-from", "patience"],
)
def test_settings_that_favor_a_direction_are_refused(
    override: str,
    kind: type[MegabackError],
    words: tuple[str, ...],
    config_path: Path,
    tmp_path: Path,
) -> None:
    result = arrow(config_path, f"run={tmp_path / 'run'}", override)

    assert_refused(result, kind, *words)
    assert not (tmp_path / "run").exists()


def test_shards_that_cannot_be_read_both_ways_are_refused(
    tmp_path: Path, tiny_text_folder: Path, tokenizer_path: Path, run_megaback: Callable[..., Any]
) -> None:
    path = tmp_path / "tiny.yaml"
    for name, options, kind, word in (
        ("words", ("--unit", "word", "--val-fraction", 0.1), DirectionMismatchError, "be reversed"),
        ("no-val", ("--val-fraction", 0), ShardsMissingError, "--val-fraction"),
    ):
        shards = tmp_path / name
        built = run_megaback(
            *("shards", "build", "--source", tiny_text_folder, "--tokenizer", tokenizer_path),
            *("--out", shards, *options),
        )
        assert built.returncode == 0, built.stderr
        path.write_text(yaml.safe_dump(tiny_config(shards)))

        result = arrow(path, f"run={tmp_path / 'run'}")

        assert_refused(result, kind, word)
        assert not (tmp_path / "run").exists()


def test_one_document_is_too_few(tmp_path: Path, tiny_shards: Path) -> None:
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    fields = json.loads((shards / "manifest.json").read_text())
    for entry in fields["shards"]:
        if entry["split"] == "val":
            entry["documents"] = 1
    (shards / "manifest.json").write_text(json.dumps(fields))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(shards)))

    result = arrow(path, f"run={tmp_path / 'run'}")

    assert_refused(result, SourceEmptyError, "fewer than 2 documents", "--val-fraction")
    assert not (tmp_path / "run").exists()
