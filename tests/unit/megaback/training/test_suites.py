"""Suites during training: the numbers of `megaback eval`, and training that does not change."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from data_pipeline.errors import ConfigError, PreemptedError
from data_pipeline.text.codec import Direction
from megaback.config import Config
from megaback.config_validation import ValidationSection
from megaback.data import open_data
from megaback.distributed.world import World
from megaback.model.gpt import ReverseGPT
from megaback.tracking.metrics import MACHINE_FIELDS, read_metrics
from megaback.training import suites
from megaback.training.suites import measure_suites, open_suites, spread
from tests.helpers.benchmark_rows import save_benchmarks
from tests.helpers.models import write_model
from tests.helpers.training import at_forward, signal_itself, train, trainer_of
from tools.evaluate import main

Configs = Callable[..., Config]
NAMES = ("openbookqa", "piqa", "winogrande", "lambada")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_benchmarks(tmp_path_factory.mktemp("saved"), *NAMES)


@pytest.fixture
def section(saved: Path) -> dict[str, Any]:
    return {"every_steps": 2, "suites": NAMES, "suite_folder": saved}


def lines_of(config: Config) -> list[dict[str, Any]]:
    """Metrics without those of the machine."""
    return [
        {name: value for name, value in line.items() if name not in MACHINE_FIELDS}
        for line in read_metrics(config.run)
    ]


@pytest.mark.parametrize(
    ("direction", "scoring"),
    [(Direction.FORWARD, "question"), *((Direction.BACKWARD, one) for one in ("joint", "ratio"))],
)
def test_values_are_those_of_eval(
    direction: Direction,
    scoring: str,
    config_of: Configs,
    tiny_shards: Path,
    section: dict[str, Any],
    training_world: World,
    tmp_path: Path,
) -> None:
    data = {"shards": str(tiny_shards), "direction": direction.value}
    config = config_of(data=data, validation={**section, "suite_scoring": scoring})
    opened = open_data(config, 0, 1)
    model = ReverseGPT(config.model, opened.codec.vocab_size)
    model.initialize(1)
    found = open_suites(config, opened, training_world)
    assert found is not None
    found.passes = [[number] for number in range(len(found.texts))]

    results = measure_suites(model, found, training_world, lambda: None, lambda: False)

    folder = write_model(tmp_path / "model", model, opened.given.codec, 64)
    out = tmp_path / "out.json"
    arguments = ["--suite", ",".join(NAMES), "--benchmarks", section["suite_folder"], "--out", out]
    done = CliRunner().invoke(main, [str(one) for one in (folder, *arguments)])
    assert done.exit_code == 0, done.output
    of_eval = json.loads(out.read_text())["suites"]
    assert results is not None
    for name, metrics in results.items():
        for key, metric in metrics.items():
            expected = of_eval[name]["metrics"][key.replace("bits_per_byte", "bits/byte")]
            assert metric.to_dict() == pytest.approx(expected, abs=1e-5), (name, key)
    assert {*results["lambada"]} == {"bits_per_byte"}
    expected_keys = {"acc"} if direction is Direction.FORWARD else {scoring}
    assert {*results["winogrande"]} == expected_keys
    assert model.training


@pytest.mark.parametrize("stage", [1, 3])
def test_training_is_the_same_with_suites(
    stage: int, config_of: Configs, training_world: World, section: dict[str, Any]
) -> None:
    sections = {"zero": {"stage": stage}, "optimizer": {"learning_rate": 0.01}}
    without = config_of("without", validation={"every_steps": 2}, **sections)
    config = config_of("with", validation={**section, "suites_every_steps": 1}, **sections)

    train(without, training_world)
    train(config, training_world)

    lines = lines_of(config)
    assert [line for line in lines if "suites" not in line] == lines_of(without)
    measured = [line for line in lines if "suites" in line]
    assert [line["step"] for line in measured] == [0, 1, 2, 3, 4]
    assert all({*line["suites"]} == {*NAMES} for line in measured)
    openbookqa = measured[0]["suites"]["openbookqa"]["question"]
    assert (openbookqa["rows"], openbookqa["chance"]) == (3, 0.25)
    bits = [line["suites"]["lambada"]["bits_per_byte"]["value"] for line in measured]
    assert len({*bits}) == 5


def test_a_run_that_stops_during_suites_measures_them_on_resume(
    config_of: Configs,
    training_world: World,
    section: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(suites, "_TOKENS_PER_PASS", 64)
    whole = config_of("whole", validation=section)
    train(whole, training_world)
    config = config_of(validation=section)
    with trainer_of(config, training_world) as (trainer, run):
        num_passes = 0

        def stop_in_second_suites(module: torch.nn.Module, *_: object) -> None:
            nonlocal num_passes
            num_passes += not module.training and run.watchdog._beat.phase == "measuring suites"
            if num_passes == len(run.suites.passes) + 1:  # type: ignore[union-attr]
                signal_itself(signal.SIGTERM)(None)

        run.engine.module.register_forward_hook(stop_in_second_suites)
        with pytest.raises(PreemptedError, match="asked to stop after 2 steps"):
            trainer.train()
        assert num_passes < 2 * len(run.suites.passes)  # type: ignore[union-attr]
    assert "suites of step 2: not measured" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(config) if "suites" in line] == [0]

    train(config, training_world)

    assert lines_of(config) == lines_of(whole)


@pytest.mark.parametrize("num_suites", [2, len(NAMES)])
def test_a_resumed_run_does_not_measure_suites_again_and_reports_other_rows(
    num_suites: int,
    config_of: Configs,
    training_world: World,
    section: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(validation=section, checkpoint={"every_steps": 2})
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 2 * 2 + 1, signal_itself(signal.SIGTERM))
        with pytest.raises(PreemptedError):
            trainer.train()

    capsys.readouterr()
    fewer = config.validation.model_copy(update={"suites": NAMES[:num_suites]})
    train(config.model_copy(update={"validation": fewer}), training_world)

    assert [line["step"] for line in lines_of(config) if "suites" in line] == [0, 2, 4]
    is_reported = "are not those of step 2 and before" in capsys.readouterr().out
    assert is_reported == (num_suites < len(NAMES))


def test_rows_are_spread_over_a_suite() -> None:
    assert spread(10, 3) == [0, 3, 6]
    assert spread(3, 200) == spread(3, None) == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suites": "sciq"}, "give a list of names"),
        ({"suites": ["sciqq"]}, "'arc_easy', 'arc_challenge'"),
        ({"suite_rows": 0}, "greater than or equal to 1"),
    ],
)
def test_suites_of_other_forms_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ValidationSection.model_validate(fields)


def test_a_missing_folder_of_suites_is_refused_by_the_launcher_too(
    config_of: Configs, tmp_path: Path
) -> None:
    config = config_of(validation={"suites": ["sciq"], "suite_folder": tmp_path / "absent"})

    with pytest.raises(ConfigError, match="absent is not a folder"):
        open_data(config, 0, 1)


def test_suites_without_rows_are_refused_before_the_run_has_a_folder(
    config_of: Configs, training_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(validation={"suites": ["sciq"], "suite_folder": tmp_path})

    with pytest.raises(SystemExit), trainer_of(config, training_world):
        pass

    assert "omit validation.suite_folder" in capsys.readouterr().err
    assert not config.run.exists()
