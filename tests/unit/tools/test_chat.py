"""`megaback chat`: log-probabilities, candidates, and the command's three modes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import PromptError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.chat import Chat
from megaback.inference.decoder import Decoder
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from tests.helpers.models import CONTEXT_TOKENS, random_model, write_model
from tools.chat import main

Codecs = Callable[..., TextCodec]
Ask = Callable[..., Result]

IDS = st.lists(st.integers(0, 599), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model() -> ReverseGPT:
    return random_model()


def decoder_of(model: ReverseGPT) -> Decoder:
    return Decoder(model, CONTEXT_TOKENS, takes_over=False)


@pytest.fixture(scope="module")
def form(codec: Codecs) -> ChatFormat:
    return ChatFormat(codec())


@settings(max_examples=20)
@given(st.lists(st.builds(Continuation, IDS, IDS), min_size=1, max_size=6))
def test_packed_log_probabilities_match_those_computed_one_by_one(
    model: ReverseGPT, continuations: list[Continuation]
) -> None:
    alone = [log_probabilities(model, [one])[0] for one in continuations]
    assert log_probabilities(model, continuations) == pytest.approx(alone, abs=1e-4)


def test_the_probabilities_of_all_next_tokens_sum_to_one(
    model: ReverseGPT,
) -> None:
    every = [Continuation([5, 7], [piece_id]) for piece_id in range(600)]
    total = sum(math.exp(one) for one in log_probabilities(model, every))
    assert total == pytest.approx(1.0, abs=1e-4)
    (two,) = log_probabilities(model, [Continuation([5, 7], [3, 4])])
    parts = [Continuation([5, 7], [3]), Continuation([5, 7, 3], [4])]
    assert two == pytest.approx(sum(log_probabilities(model, parts)), abs=1e-4)


def test_candidates_are_distinct_and_complete_ones_come_first_by_likelihood(
    model: ReverseGPT, form: ChatFormat
) -> None:
    options = SamplingOptions(temperature=1.0, top_k=0)
    found = Chat(model, decoder_of(model), form).answer("a map", options, count=150)
    ended = [one for one in found if one.is_complete]
    assert 2 <= len(ended) < len(found) <= 150
    assert found[: len(ended)] == ended  # truncated ones follow
    likelihoods = [one.log_probability for one in ended]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert len({one.text for one in ended}) > len(ended) // 2
    room = CONTEXT_TOKENS - len(form.prompt_ids("a map"))
    assert {one.tokens for one in found if not one.is_complete} == {room}
    assert all(1 < one.tokens <= room for one in ended)


def test_greedy_sampling_gives_one_candidate(model: ReverseGPT, form: ChatFormat) -> None:
    options = SamplingOptions(max_new_tokens=8, temperature=0.0)
    (only,) = Chat(model, decoder_of(model), form).answer("a map", options, count=3)
    assert (only.tokens, only.is_complete) == (8, False)
    assert only in Chat(model, decoder_of(model), form).answer("a map", replace(options, seed=5))


def test_a_prompt_that_fills_the_context_is_refused(model: ReverseGPT, form: ChatFormat) -> None:
    with pytest.raises(PromptError, match=r"the response has .* shorten it"):
        Chat(model, decoder_of(model), form).answer("a map " * 60, SamplingOptions())


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, model: ReverseGPT, codec: Codecs
) -> Callable[[Direction], Path]:
    """`folder_of(direction)`: the model in a folder."""

    def make(direction: Direction) -> Path:
        return write_model(tmp_path_factory.mktemp("model"), model, codec(direction))

    return make


@pytest.fixture(scope="module")
def ask(folder_of: Callable[[Direction], Path]) -> Ask:
    """`ask(*arguments, lines="")`: runs the command on a backward model, with `lines` as stdin."""
    folder = folder_of(Direction.BACKWARD)

    def run(*arguments: object, lines: str = "") -> Result:
        command = [folder, "--device", "cpu", "--max-new-tokens", 6, *arguments]
        return CliRunner().invoke(main, [str(part) for part in command], input=lines)

    return run


def test_each_line_of_json_is_answered_in_order(ask: Ask) -> None:
    requests = [
        {"response": "the last map", "n": 3},
        {"response": "<|im_end|><|im_start|>", "temp": 0},
        {"ending": "and said nothing.", "tokens": 3, "seed": 9},
    ]
    result = ask("--json", lines="\n".join(map(json.dumps, requests)) + "\n\n")
    assert result.exit_code == 0, result.output
    first, second, third = map(json.loads, result.output.splitlines())
    assert first["response"] == "the last map"
    assert first["instruction"] == first["candidates"][0]["instruction"]
    assert len(first["candidates"]) == 3
    assert set(first["candidates"][0]) == {
        *("instruction", "log_probability", "tokens", "is_complete")
    }
    assert second["response"] == "<|im_end|><|im_start|>"
    assert third["text"].endswith("and said nothing.")
    assert third["seed"] == 9


def test_invalid_lines_have_errors_and_the_command_fails_at_the_end(ask: Ask) -> None:
    lines = [
        "no json",
        '"text"',
        '{"response": "a", "ending": "b"}',
        '{"response": 3}',
        '{"response": " "}',
        '{"response": "a", "n": 0}',
        '{"response": "a", "temp": "hot"}',
        '{"response": "a", "color": "red"}',
        json.dumps({"response": "a map " * 60}),
        '{"response": "a"}',
    ]
    result = ask("--json", lines="\n".join(lines))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.get("line") for answer in answers] == [1, 2, 3, 4, 5, 6, 7, 8, 9, None]
    reasons = ["JSON", "either", "either", "not text", "empty", "'n'", "temp", "color", "shorten"]
    for answer, reason in zip(answers, reasons, strict=False):
        assert reason in answer["error"]
    assert result.exit_code == 23
    assert "9 of 10 lines have errors; the first is line 1: not valid JSON" in result.stderr


def test_the_interactive_prompt_changes_settings_and_keeps_a_history(
    ask: Ask, tmp_path: Path
) -> None:
    kept = tmp_path / "history.jsonl"
    typed = ["the last map", "n=2", "temp=9", "top_k=x", "a map", "ending=the end.", "history", ""]
    result = ask("--history", kept, lines="\n".join(typed) + "\n")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Instruction: ") == 1
    assert result.stdout.count(" nats): ") == 2
    assert "'top_k=x' is not a value" in result.stderr
    assert "the end." in result.stdout
    assert "  2 response: a map" in result.stdout
    exchanges = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [exchange["response"] for exchange in exchanges] == ["the last map", "a map"]
    again = ask("--history", kept, lines="history\n\n")
    assert "  1 response: the last map" in again.stdout


def test_one_response_is_answered_and_kept(ask: Ask, tmp_path: Path) -> None:
    kept = tmp_path / "history.jsonl"
    result = ask("--response", "the last map", "--history", kept)
    exchange = json.loads(kept.read_text())
    assert result.stdout.startswith(f"Instruction: {exchange['instruction']}")


@pytest.mark.parametrize(
    "content",
    ['{\n  "format": "x"\n}\n', '{"instruction": "a", "output": "b"}\n', "notes\n", "[1]\n"],
)
def test_a_file_that_is_not_a_history_is_not_changed(
    ask: Ask, tmp_path: Path, content: str
) -> None:
    (tmp_path / "mine").write_text(content)
    result = ask("--response", "the last map", "--history", tmp_path / "mine")
    assert (result.exit_code, "holds something that this command" in result.stderr) == (44, True)
    assert (tmp_path / "mine").read_text() == content


def test_a_history_inside_the_model_folder_is_refused(
    folder_of: Callable[[Direction], Path],
) -> None:
    folder = folder_of(Direction.BACKWARD)
    kept = folder / "history.jsonl"
    result = CliRunner().invoke(main, [str(folder), "--response", "a", "--history", str(kept)])
    assert (result.exit_code, kept.exists()) == (44, False)


def test_a_forward_model_responds_to_instructions(folder_of: Callable[[Direction], Path]) -> None:
    folder = folder_of(Direction.FORWARD)
    command = [str(folder), "--device", "cpu", "--max-new-tokens", "3"]
    lines = '{"instruction": "Who?"}\n{"beginning": "The old"}\n'
    answers = CliRunner().invoke(main, [*command, "--json"], input=lines).output.splitlines()
    assert set(json.loads(answers[0])) == {"instruction", "response", "candidates", "seed"}
    assert json.loads(answers[1])["text"].startswith("The old")
    refused = CliRunner().invoke(main, [*command, "--response", "x"])
    assert refused.exit_code == 33
    assert "use --instruction or --beginning" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--response", " "], 43, "empty"),
        (["--response", "a", "--json"], 2, "Give one of"),
        (["--instruction", "a"], 33, "use --response or --ending"),
        (["--num-samples", "0"], 2, "--num-samples"),
        (["--response", "a map " * 60], 43, "shorten"),
    ],
)
def test_invalid_arguments_are_refused(
    ask: Ask, arguments: list[str], exit_code: int, message: str
) -> None:
    result = ask(*arguments)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.output
