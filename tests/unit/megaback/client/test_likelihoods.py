"""Scores by a server equal those of the model here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import megaback
from data_pipeline.text.codec import TextCodec
from megaback import Pair, errors
from megaback.client.connection import Connection
from megaback.client.servers import VllmServer
from megaback.inference.likelihood import Continuation, Likelihood
from tests.helpers.server import Running, serving, tiny_models
from tools import rerank, score
from tools.serving.models import ServedModel

Codecs = Callable[..., TextCodec]
PAIRS = [Pair("Name a map.", "the wall"), Pair("☃?", "is of the"), Pair("a" * 9, "b")] * 30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("remote"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_scores_equal_those_of_the_model_here(
    running: Running, models: dict[str, ServedModel], name: str
) -> None:
    folder = models[name].folder
    for form in ("chat", "plain"):
        with (
            megaback.load_scorer(folder, form=form, server=running.url) as there,
            megaback.load_scorer(folder, form=form, device="cpu", dtype="float32") as here,
        ):
            assert there.dtype == "float32"
            for one, other in zip(there.score(PAIRS), here.score(PAIRS), strict=True):
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
                assert one.log_ratio == pytest.approx(other.log_ratio, abs=1e-4)


def test_the_commands_score_and_rank_by_a_server(
    running: Running, models: dict[str, ServedModel], tmp_path: Path
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"question": "the map?", "answer": "a wall"}\n')
    candidates = {"question": "the map?", "candidates": ["a wall", "is of", "the captain"]}
    (tmp_path / "candidates.jsonl").write_text(json.dumps(candidates) + "\n")
    folder = str(models["tiny"].folder)

    def written(main: Any, source: str, *options: str) -> Any:
        out = tmp_path / "out.jsonl"
        command = [folder, "--in", str(tmp_path / source), "--out", str(out), *options]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        out.unlink()
        return found

    served = ("--server", running.url, "--server-model", "tiny")
    there, here = (written(score.main, "pairs.jsonl", *more) for more in (served, ()))
    assert there["score"] == pytest.approx(here["score"], abs=1e-4)
    there, here = (written(rerank.main, "candidates.jsonl", *more) for more in (served, ()))
    assert there["ranking"] == here["ranking"]
    refused = CliRunner().invoke(
        score.main, [folder, "--in", "-", "--out", "-", "--dtype", "float32", *served], input="{}"
    )
    assert (refused.exit_code, "--server computes" in refused.output) == (10, True)


def test_vllms_prompt_logprobs_are_read_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": None}

    def ask(_self: Connection, path: str, fields: dict[str, Any]) -> Any:
        assert (path, fields["prompt"]) == ("/v1/completions", [[1, 5, 6], [1, 7]])
        first = [None, {"5": entry(-0.5, 1)}, {"8": entry(-0.1, 1), "6": entry(-2.0, 3)}]
        second = [None, {"7": entry(-0.25, 1)}]
        return {"choices": [{"prompt_logprobs": first}, {"prompt_logprobs": second}]}

    monkeypatch.setattr(Connection, "ask", ask)
    server = VllmServer(Connection("http://127.0.0.1:1"), "model", 64)
    found = server.likelihoods([Continuation([1], [5, 6]), Continuation([1], [7])])
    assert found == [Likelihood(-2.5, False), Likelihood(-0.25, True)]


def test_a_model_of_a_server_needs_the_server(models: dict[str, ServedModel]) -> None:
    with pytest.raises(errors.ConfigError, match="add `server`"):
        megaback.load_scorer(models["tiny"].folder, server_model="tiny")
