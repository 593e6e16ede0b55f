"""lm_eval's numbers of a model are the same through megaback as through its own `hf` model."""

import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from data_pipeline.errors import ConfigError, DirectionMismatchError
from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.exports import write_checkpoint
from tests.helpers.server import load_models, serving
from tools.convert import convert

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from tools.harness.lm_eval_model import MegabackLM
from tools.lm_eval import main, register

Codecs = Callable[..., TextCodec]
WORDS = ["map", "road", "clock", "bottle", "the", "wall", "captain", "is", "of", "river"]
TASKS = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
---
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
---
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: [".", "e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
NAMES = ["local_choice", "local_rolling", "local_generation"]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary caches in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        register()
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of 40 made-up rows, some of which are longer than the models' context."""
    folder, generator = tmp_path_factory.mktemp("tasks"), random.Random(3)

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    rows = [
        {
            "question": words(generator.choice([3, 6, 9, 40])),
            "choices": [words(generator.randint(1, 4)) for _ in range(4)],
            "label": generator.randrange(4),
            "text": words(generator.choice([5, 60])),
        }
        for _ in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in zip(NAMES, TASKS.format(folder=folder).split("---"), strict=True):
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Path]:
    found = {}
    for direction in Direction:
        folder = tmp_path_factory.mktemp(direction.value)
        write_checkpoint(folder / "run", codec(direction, Unit.TOKEN))
        convert(folder / "run", folder / "model", "hf", "float32")
        found[direction] = folder / "model"
    return found


def results_of(tasks: Path, model: Any, names: list[str], **arguments: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments or None,
        tasks=names,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return found


def numbers_of(results: dict[str, Any], task: str) -> list[Any]:
    """Answers of the model to the requests of a task, in one order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["filtered_resps"]]


def test_forward_results_are_those_of_the_hf_model(
    folders: dict[Direction, Path], tasks: Path
) -> None:
    folder = str(folders[Direction.FORWARD])
    ours = results_of(tasks, "megaback", NAMES, pretrained=folder, device="cpu")
    how = {"pretrained": folder, "device": "cpu", "dtype": "float32", "trust_remote_code": True}
    theirs = results_of(tasks, "hf", NAMES, **how)

    for metric in ("acc,none", "acc_norm,none"):
        name = "local_choice"
        assert ours["results"][name][metric] == theirs["results"][name][metric]
    for mine, other in zip(
        numbers_of(ours, "local_choice"), numbers_of(theirs, "local_choice"), strict=True
    ):
        assert float(mine[0]) == pytest.approx(float(other[0]), abs=1e-5, rel=1e-6)
        assert mine[1] == other[1]
    written, whole = (numbers_of(one, "local_generation") for one in (ours, theirs))
    assert written == whole
    assert len(set(written)) > 10


def test_rolling_windows_are_those_of_lm_eval(
    folders: dict[Direction, Path], tasks: Path, codec: Codecs
) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ours = MegabackLM(folders[Direction.FORWARD], device="cpu")
    encoder = ours._encoder
    for count in (1, 63, 64, 65, 128, 200):
        text = "z" * count
        ids = encoder.codec.encode(text).tolist()
        begin = encoder.codec.begin_id
        windows = get_rolling_token_windows(ids, begin, encoder.context_tokens, 1)
        assert [(list(one.given), list(one.written)) for one in encoder.document_windows(text)] == [
            make_disjoint_window(window) for window in windows
        ]


def test_a_backward_model_scores_the_question(folders: dict[Direction, Path], tasks: Path) -> None:
    folder = folders[Direction.BACKWARD]
    found = {
        scoring: results_of(
            tasks, "megaback", NAMES[:2], pretrained=folder, device="cpu", scoring=scoring
        )
        for scoring in ("question", "joint", "normalized", "ratio")
    }
    of_each = {
        name: [float(one[0]) for one in numbers_of(one, "local_choice")]
        for name, one in found.items()
    }
    lm = MegabackLM(folder, device="cpu")
    for number, sample in enumerate(
        sorted(found["question"]["samples"]["local_choice"], key=lambda one: one["doc_id"])[:5]
    ):
        for choice, arguments in enumerate(sample["arguments"]):
            context, answer = arguments
            whole = [lm._codec.begin_id, *lm._codec.encode(context + answer).tolist()]
            if len(whole) > 64:
                continue
            num_given = 1 + len(lm._codec.encode(answer))
            from megaback.inference.likelihood import Continuation, token_log_probabilities

            (terms,) = token_log_probabilities(lm._model, [Continuation(whole[:1], whole[1:])])
            expected = float(terms[num_given - 1 :].sum())
            at = 4 * number + choice
            assert of_each["question"][at] == pytest.approx(expected, abs=1e-5)
            assert of_each["joint"][at] == pytest.approx(float(terms.sum()), abs=1e-5)
    assert len({tuple(values) for values in of_each.values()}) == 4
    rolling = found["question"]["results"]["local_rolling"]["bits_per_byte,none"]
    assert math.isfinite(rolling)
    assert rolling > 0


@pytest.mark.parametrize("direction", Direction)
def test_a_server_gives_equal_results(
    folders: dict[Direction, Path], tasks: Path, direction: Direction
) -> None:
    import torch

    models = load_models(folders[direction], None, torch.device("cpu"), torch.float32, 8)
    generation = {"generates": "before"} if direction is Direction.BACKWARD else {}
    with serving(models) as running:
        served = results_of(
            tasks,
            "megaback",
            NAMES,
            pretrained=folders[direction],
            base_url=running.url,
            **generation,
        )
    here = MegabackLM(folders[direction], device="cpu", **generation)
    here._encoder.context_tokens -= 1  # a server counts the last id, too
    local = results_of(tasks, here, NAMES)

    for name in NAMES[:2]:
        for mine, other in zip(numbers_of(local, name), numbers_of(served, name), strict=True):
            one, two = (pair if name == NAMES[1] else pair[0] for pair in (mine, other))
            assert float(one) == pytest.approx(float(two), abs=1e-4)
    assert numbers_of(local, NAMES[0])[0][1] == numbers_of(served, NAMES[0])[0][1]
    assert numbers_of(local, NAMES[2]) == numbers_of(served, NAMES[2])


def test_what_has_no_meaning_is_refused(folders: dict[Direction, Path]) -> None:
    backward, forward = folders[Direction.BACKWARD], folders[Direction.FORWARD]
    request = SimpleNamespace(args=("the wall", {"until": []}))

    with pytest.raises(DirectionMismatchError, match="generates=before"):
        MegabackLM(backward, device="cpu").generate_until([request])
    with pytest.raises(ConfigError, match="writes forward"):
        MegabackLM(forward, scoring="joint")
    bad = SimpleNamespace(args=("the wall", {"num_beams": 4}))
    with pytest.raises(ConfigError, match="'num_beams'"):
        MegabackLM(forward, device="cpu").generate_until([bad])
    long = SimpleNamespace(args=("the wall", {"max_gen_toks": 64}))
    with pytest.raises(ConfigError, match="leaves none"):
        MegabackLM(forward, device="cpu").generate_until([long])
    with pytest.raises(ConfigError, match="chat template"):
        MegabackLM(forward).apply_chat_template([])


def test_the_command_passes_its_arguments_on(
    folders: dict[Direction, Path], tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["megaback"])
    out = tmp_path / "out"
    command = ["run", "--model", "megaback", "--tasks", "local_choice", "--limit", "5"]
    command += ["--model_args", f"pretrained={folders[Direction.BACKWARD]}"]
    command += ["--include_path", str(tasks), "--output_path", str(out)]
    result = CliRunner().invoke(main, command, catch_exceptions=False)

    assert result.exit_code == 0, result.output
    (written,) = out.rglob("results*.json")
    assert json.loads(written.read_text())["n-samples"]["local_choice"]["effective"] == 5
