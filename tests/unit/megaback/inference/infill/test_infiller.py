"""Infilling with two models: whole texts, exact scores, each gap the same as alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import (
    ConfigError,
    DirectionMismatchError,
    PromptError,
    TokenizerMismatchError,
)
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from megaback.config import ModelSection
from megaback.inference.decoder import Decoder
from megaback.inference.infill.infiller import Infiller, InfillOptions, Reader
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from tests.helpers.models import write_model
from tools.infill import main

Codecs = Callable[..., TextCodec]
Ask = Callable[..., Result]

CONTEXT_TOKENS = 96
SHAPE = ModelSection(num_layers=2, width=16, num_heads=2).resolved()
OPTIONS = InfillOptions(max_new_tokens=8, forward_candidates=4, backward_candidates=3, rescored=12)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9) | st.sampled_from(
    ["<|im_end|>", "the old capt", "ain sold a map.", "\ud800", "<|endoftext|>"]
)
GAPS = [("the old captain", "the last map."), ("<|im_start|>", " a"), ("A str", "orth.")]


def model_of(seed: int) -> ReverseGPT:
    """A model with large weights, so that its predictions differ."""
    model = ReverseGPT(SHAPE, 600)
    model.initialize(seed)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model.eval()


def reader_of(seed: int, codec: TextCodec) -> Reader:
    model = model_of(seed)
    return Reader(model, Decoder(model, CONTEXT_TOKENS, takes_over=False), codec)


@pytest.fixture(scope="module")
def infiller(codec: Codecs) -> Infiller:
    return Infiller(reader_of(1, codec(Direction.FORWARD)), reader_of(2, codec(Direction.BACKWARD)))


def log_probability_of_a_text(reader: Reader, text: str, first: int = 0) -> float:
    """log P of the ids from `first` on, after the begin marker and the ids before."""
    begin = [reader.codec.begin_id]
    ids = reader.codec.encode(text).tolist()
    (nats,) = log_probabilities(reader.model, [Continuation([*begin, *ids[:first]], ids[first:])])
    return nats


@settings(max_examples=25)
@given(beginning=TEXT, ending=TEXT, seed=st.integers(0, 99))
def test_the_score_of_a_middle_is_that_of_the_whole_text(
    infiller: Infiller, beginning: str, ending: str, seed: int
) -> None:
    options = replace(OPTIONS, sampling=SamplingOptions(temperature=1.0, seed=seed))
    found = infiller.fill(beginning, ending, options)
    assert len({one.middle for one in found}) == len(found)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found[:2]:
        text = beginning + one.middle + ending
        for reader, edge, nats, tokens in (
            (infiller.forward, beginning, one.forward, one.forward_tokens),
            (infiller.backward, ending, one.backward, one.backward_tokens),
        ):
            codec = reader.codec
            assert codec.render(codec.encode(text)) == text
            prompt = codec.prompt(edge).ids
            before = 0.0
            if len(prompt) > 1:
                (before,) = log_probabilities(reader.model, [Continuation(prompt[:1], prompt[1:])])
            assert nats == pytest.approx(log_probability_of_a_text(reader, text) - before, abs=1e-3)
            assert tokens == len(codec.encode(text)) + 1 - len(prompt)
        total = one.forward_tokens + one.backward_tokens
        assert one.score == pytest.approx((one.forward + one.backward) / total, abs=1e-6)


def test_a_gap_among_others_is_filled_as_alone(infiller: Infiller) -> None:
    together = infiller.fill_many(GAPS, OPTIONS)
    for gap, found in zip(GAPS, together, strict=True):
        alone = infiller.fill(*gap, OPTIONS)
        assert [one.middle for one in alone] == [one.middle for one in found]
        assert [one.score for one in alone] == pytest.approx([one.score for one in found], abs=1e-4)


def test_the_seed_determines_the_middles(infiller: Infiller) -> None:
    options = [replace(OPTIONS, sampling=SamplingOptions(seed=seed)) for seed in (0, 0, 1)]
    same, again, other = (infiller.fill(*GAPS[0], one) for one in options)
    assert same == again
    assert {one.middle for one in same} != {one.middle for one in other}


def test_lengths_are_respected_and_either_model_can_write_alone(infiller: Infiller) -> None:
    options = replace(OPTIONS, min_new_tokens=3, max_new_tokens=5)
    for one in infiller.fill(*GAPS[0], options):
        assert 3 <= (one.written_forward or 0) + (one.written_backward or 0) <= 5
    forward = infiller.fill(*GAPS[0], replace(options, backward_candidates=0, forward_weight=1.0))
    assert {one.written_backward for one in forward} == {0}
    assert forward[0].score == max(one.forward / one.forward_tokens for one in forward)
    backward = infiller.fill(*GAPS[0], replace(options, forward_candidates=0, forward_weight=0.0))
    assert {one.written_forward for one in backward} == {0}


def test_given_middles_are_scored_like_found_ones(infiller: Infiller) -> None:
    found = infiller.fill(*GAPS[2], OPTIONS)[:3]
    judged = infiller.score(*GAPS[2], [one.middle for one in found])
    assert [one.score for one in judged] == pytest.approx([one.score for one in found], abs=1e-5)
    assert judged[0].written_forward is None
    with pytest.raises(PromptError, match="shorten"):
        infiller.score(*GAPS[0], ["a map " * 60])


def test_models_that_do_not_fit_together_are_refused(
    codec: Codecs, tiny_text_folder: Path, tmp_path: Path
) -> None:
    forward, backward = (reader_of(1, codec(direction)) for direction in reversed(Direction))
    with pytest.raises(DirectionMismatchError, match="the backward model writes forward"):
        Infiller(forward, forward)
    with pytest.raises(DirectionMismatchError, match="has unit 'word'"):
        Infiller(forward, reader_of(1, codec(Direction.BACKWARD, Unit.WORD)))
    train_tokenizer(str(tiny_text_folder), tmp_path, 590)
    other = TextCodec.load(tmp_path / TOKENIZER_NAME, Direction.BACKWARD, Unit.TOKEN)
    hashes = f"{forward.codec.format.tokenizer_sha256[:12]}.*{other.format.tokenizer_sha256[:12]}"
    with pytest.raises(TokenizerMismatchError, match=hashes):
        Infiller(forward, replace(backward, codec=other))


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_new_tokens": 0},
        {"max_new_tokens": 0},
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"forward_candidates": -1},
        {"forward_candidates": 0, "backward_candidates": 0},
        {"rescored": 0},
        {"forward_weight": 1.5},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))[-6:]):
        InfillOptions(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, infiller: Infiller, codec: Codecs
) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = [
        write_model(folder / name, reader.model, reader.codec, CONTEXT_TOKENS)
        for name, reader in (("forward", infiller.forward), ("backward", infiller.backward))
    ]
    return made[0], made[1]


@pytest.fixture(scope="module")
def ask(folders: tuple[Path, Path]) -> Ask:
    """`ask(*arguments, lines=...)`: the command with its stdin."""
    forward, backward = folders
    command = [
        "--forward",
        forward,
        "--backward",
        backward,
        "--device",
        "cpu",
        "--max-new-tokens",
        6,
    ]

    def run(*arguments: object, lines: str = "") -> Result:
        words = [str(part) for part in (*command, "--candidates", 3, *arguments)]
        return CliRunner().invoke(main, words, input=lines)

    return run


def test_a_json_line_has_the_same_result_as_alone(ask: Ask) -> None:
    requests = [
        {"beginning": beginning, "ending": ending, "n": number}
        for number, (beginning, ending) in enumerate(GAPS, start=1)
    ]
    requests[0] |= {"seed": 4, "temperature": 1.5, "top_k": 9, "candidates": 2, "tokens": 3}
    lines = [json.dumps(request) for request in requests]
    result = ask("--json", lines="\n\n".join(lines))
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for number, (request, line, answer) in enumerate(
        zip(requests, lines, answers, strict=True), start=1
    ):
        assert (answer["beginning"], answer["ending"]) == (request["beginning"], request["ending"])
        assert answer["middle"] == answer["infills"][0]["middle"]
        assert len(answer["infills"]) == number
        assert json.loads(ask("--json", lines=line).stdout) == answer
    assert [answer["seed"] for answer in answers] == [4, 0, 0]


def test_invalid_lines_have_an_error_and_the_command_fails_at_the_end(ask: Ask) -> None:
    good = {"beginning": "a", "ending": "b"}
    lines = [
        *("no json", "[]", '{"beginning": "a"}', json.dumps(good | {"color": "red"})),
        *(json.dumps(good | {"n": 0}), json.dumps(good | {"temperature": -1})),
        *(json.dumps(good | {"ending": ""}), json.dumps(good | {"ending": "a map " * 60})),
        json.dumps(good),
    ]
    result = ask("--json", lines="\n".join(lines))
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.get("line") for answer in answers] == [1, 2, 3, 4, 5, 6, 7, 8, None]
    reasons = ["JSON", "object", "ending", "color", "'n'", "temperature", "empty", "shorten"]
    for answer, reason in zip(answers, reasons, strict=False):
        assert reason in answer["error"]
    assert result.exit_code == 23
    assert "8 of 9 lines have errors" in result.stderr


def test_the_best_text_or_several_with_their_scores_are_shown(ask: Ask) -> None:
    given = ("--beginning", "the old ", "--ending", " map.")
    best = ask(*given).stdout.removesuffix("\n")
    assert best.startswith("the old ")
    assert best.endswith(" map.")
    shown = ask(*given, "--num-samples", 2).stdout.split("\n\n---\n\n")
    assert len(shown) == 2
    assert shown[0].split(" nats/token)\n")[1] == best


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--beginning", "a"], 2, "--ending"),
        (["--beginning", "a", "--ending", "b", "--json"], 2, "either"),
        (["--beginning", "a", "--ending", ""], 43, "ending is empty"),
        (["--beginning", "a", "--ending", "b", "--min-new-tokens", "7"], 10, "--max-new-tokens"),
        (["--beginning", "a map " * 60, "--ending", "b"], 43, "shorten"),
    ],
)
def test_invalid_arguments_are_refused(
    ask: Ask, arguments: list[str], exit_code: int, message: str
) -> None:
    result = ask(*arguments)
    assert (result.exit_code, message in result.stderr) == (exit_code, True), result.output


def test_models_in_the_wrong_place_are_refused_by_name(folders: tuple[Path, Path]) -> None:
    forward, backward = map(str, folders)
    given = ["--beginning", "a", "--ending", "b"]
    turned = CliRunner().invoke(main, ["--forward", backward, "--backward", forward, *given])
    assert turned.exit_code == 33
    assert "writes backward only, not forward" in turned.stderr
