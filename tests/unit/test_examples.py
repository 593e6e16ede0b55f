"""Scripts of examples/; those on open_dataset: tests/integration/test_other_trainers.py."""

import runpy
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import megaback
from data_pipeline.text.codec import TextCodec
from megaback.cli import main as megaback_command
from tests.helpers.models import write_chat_model
from tests.helpers.paths import ROOT
from tests.helpers.runs import finished_steps

Codecs = Callable[..., TextCodec]


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("examples") / "model", codec())


def test_endings_are_completed_and_one_is_streamed(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example("complete_backward")
    script["complete"](model, max_new_tokens=5)
    *texts, streamed = capsys.readouterr().out.split("\n\n")

    assert len(texts) == len(script["ENDINGS"])
    for text, ending in zip(texts, script["ENDINGS"], strict=True):
        assert text.endswith(ending)
    added = [eval(line.removesuffix(" +")) for line in streamed.splitlines()]
    assert 1 <= len(added) <= 5
    assert "".join(reversed(added)) + script["ENDINGS"][0] == texts[0]


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_answers_are_ranked_by_the_likelihood_of_their_question(model: Path, form: str) -> None:
    answers = ["Mars", "A cat", "the road and the garden wall"]
    ranked = example("rerank_answers")["rank"](model, "Name a planet.", answers, form)

    scores = [score.log_probability for _, score in ranked]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(answers)
    with megaback.load_scorer(model, form=form) as scorer:
        for answer, score in ranked:
            (alone,) = scorer.score([megaback.Pair("Name a planet.", answer)])
            assert alone.log_probability == pytest.approx(score.log_probability, abs=1e-4)


def test_rows_of_a_database_become_documents_of_shards(
    tmp_path: Path, tokenizer_path: Path, english_documents: list[str]
) -> None:
    texts = [*english_documents[:8], "Zeilen\nund Ümläute \U0001f600"]
    database, source, out = tmp_path / "posts.db", tmp_path / "posts.jsonl.gz", tmp_path / "shards"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE posts (body TEXT)")
        connection.executemany("INSERT INTO posts VALUES (?)", [(text,) for text in texts])
    connection.close()

    query = "SELECT body FROM posts"
    assert example("documents_from_sqlite")["write"](database, query, source) == len(texts)
    words = ["shards", "build", "--source", source, "--tokenizer", tokenizer_path, "--out", out]
    words += ["--val-fraction", "0", "--frame-tokens", "64", "--workers", "1"]
    done = CliRunner().invoke(megaback_command, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(megaback_command, ["shards", "inspect", str(out), "--document", "8"])
    assert "Zeilen" in shown.output


def test_runs_are_compared_in_a_figure(tmp_path: Path) -> None:
    runs = [finished_steps(tmp_path / name, steps) for name, steps in (("a", 12), ("b", 25))]
    out = tmp_path / "curves.png"

    assert example("compare_runs")["compare"](runs, out) == {"a": 8.0, "b": 8.0}
    assert out.read_bytes().startswith(b"\x89PNG")
