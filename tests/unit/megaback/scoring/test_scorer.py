"""Scores are the model's log-probabilities of each pair alone, in any batch."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

import megaback
from data_pipeline.errors import PromptError
from data_pipeline.text.chat_format import ChatFormat, Example
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.device_pool import DevicePool
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Form, PairEncoder, Scorer
from tests.helpers.models import CONTEXT_TOKENS, random_model, write_model
from tools.score import main

Codecs = Callable[..., TextCodec]
FolderOf = Callable[[Direction], Path]

CPU = torch.device("cpu")
MARKERS = "<|im_end|><|im_start|><|instruction|>"
TEXTS = st.text(max_size=12).map(lambda text: f"a{text}")
PAIRS = st.lists(st.builds(Pair, TEXTS, TEXTS), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def model() -> ReverseGPT:
    return random_model()


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, model: ReverseGPT, codec: Codecs
) -> FolderOf:
    folder = tmp_path_factory.mktemp("models")
    return lambda direction: write_model(folder / direction.value, model, codec(direction))


@torch.inference_mode()
def by_hand(model: ReverseGPT, ids: "list[int]", num_given: int) -> float:
    """log P of one row, summed term by term."""
    ids_T = torch.tensor(ids)
    segments = Segments.from_lengths((len(ids),), CPU)
    log_TV = model.logits(ids_T, torch.arange(len(ids)), segments).double().log_softmax(-1)
    return sum(float(log_TV[at - 1, ids[at]]) for at in range(num_given, len(ids)))


@settings(max_examples=25)
@given(PAIRS, st.sampled_from(Direction))
def test_a_score_is_that_of_a_single_row(
    model: ReverseGPT, codec: Codecs, pairs: list[Pair], direction: Direction
) -> None:
    form = ChatFormat(codec(direction))
    encoder = PairEncoder(codec(direction), Form.CHAT, 1 << 20)
    found = Scorer(encoder, DevicePool(Path(), [CPU], torch.float32, model)).score(pairs)

    for pair, score in zip(pairs, found, strict=True):
        example = form.encode(Example.of(pair.question, "", pair.answer))
        alone = by_hand(model, example.ids.tolist(), example.num_given)
        assert score.log_probability == pytest.approx(alone, abs=1e-5 * max(1, score.tokens))
        assert score.tokens == len(example.ids) - example.num_given
        written = pair.question if direction is Direction.BACKWARD else pair.answer
        assert score.text_bytes == len(written.strip().encode())


def test_batches_change_no_score_by_more_than_rounding(
    model: ReverseGPT, codec: Codecs, english_documents: list[str]
) -> None:
    """Questions of one to twelve tokens, too many for one pass."""
    words = " ".join(english_documents).split()
    pairs = [Pair(words[i], " ".join(words[i + 1 : i + 2 + i % 9])) for i in range(0, 3000, 3)]
    scorer = Scorer(
        PairEncoder(codec(), Form.CHAT, 512), DevicePool(Path(), [CPU], torch.float32, model)
    )

    together = scorer.score(pairs)

    alone = [scorer.score([pair])[0] for pair in pairs[::20]]
    assert [one.log_probability for one in together[::20]] == pytest.approx(
        [one.log_probability for one in alone], abs=1e-5
    )


def test_the_plain_form_scores_a_continued_document(model: ReverseGPT, codec: Codecs) -> None:
    pair = Pair("The old captain\n", "sold a map.")
    encoder = PairEncoder(codec(), Form.PLAIN, 512)
    (score,) = Scorer(encoder, DevicePool(Path(), [CPU], torch.float32, model)).score([pair])

    begin, of = codec().begin_id, codec().encode
    given_ids, written = [begin, *of(pair.answer).tolist()], of(pair.question).tolist()
    assert codec().render([*given_ids, *written]) == pair.question + pair.answer
    alone = by_hand(model, [*given_ids, *written], len(given_ids))
    assert score.log_probability == pytest.approx(alone, abs=1e-4)
    prior = by_hand(model, [begin, *written], 1)
    assert score.prior_log_probability == pytest.approx(prior, abs=1e-4)
    assert score.log_ratio == pytest.approx(alone - prior, abs=2e-4)
    assert score.per_byte == pytest.approx(alone / len("The old captain\n"), abs=1e-5)


@pytest.mark.parametrize("form", Form)
def test_the_probabilities_of_all_questions_of_one_token_sum_to_one(
    form: Form, model: ReverseGPT, codec: Codecs
) -> None:
    """A check of the formula: scores are a distribution over the possible texts."""
    encoder = PairEncoder(codec(), form, 512)
    pair = encoder.encode(Pair("a", "the last map"))
    first = [
        by_hand(model, [*pair.conditional.given, i], len(pair.conditional.given))
        for i in range(600)
    ]
    assert np.exp(first).sum() == pytest.approx(1.0, abs=1e-6)


def test_markers_that_a_text_spells_are_text(model: ReverseGPT, codec: Codecs) -> None:
    control = set(codec().chat_ids.values())
    pair = PairEncoder(codec(), Form.CHAT, 512).encode(Pair(f"Who? {MARKERS}", f"{MARKERS} me"))
    assert [i for i in pair.conditional.given if i in control] == [
        codec().chat_ids[piece]
        for piece in (
            "<|im_start|>",
            "<|response|>",
            "<|im_end|>",
            "<|im_start|>",
            "<|instruction|>",
        )
    ]
    assert [i for i in pair.conditional.written if i in control] == [codec().chat_ids["<|im_end|>"]]


def test_pairs_longer_than_the_context_are_refused(codec: Codecs) -> None:
    with pytest.raises(PromptError, match=r"tokens, more than the model's context of 64; shorten"):
        PairEncoder(codec(), Form.CHAT, CONTEXT_TOKENS).encode(Pair("a map " * 40, "b"))


def test_two_devices_give_the_scores_of_one_in_the_same_order(
    folder_of: FolderOf, english_documents: list[str]
) -> None:
    pairs = [Pair(f"Number {i}?", text[: 10 + i]) for i, text in enumerate(english_documents[:40])]
    with megaback.load_scorer(folder_of(Direction.BACKWARD), device="cpu,cpu") as scorer:
        apart = scorer.score(pairs)
    with megaback.load_scorer(folder_of(Direction.BACKWARD), device="cpu") as scorer:
        together = scorer.score(pairs)
    assert [one.log_probability for one in apart] == pytest.approx(
        [one.log_probability for one in together], abs=1e-5
    )


# The command.

ROWS = [
    {"question": "Who sold it?", "answer": "The old captain.", "id": 7},
    {"instruction": "Say who.", "input": "a map", "output": "My younger sister."},
    {"question": "<|im_end|>", "answer": "<|response|>"},
]


def score(folder: Path, *arguments: object, lines: str = "") -> Result:
    command = [folder, "--device", "cpu", *arguments]
    return CliRunner().invoke(main, [str(part) for part in command], input=lines)


def as_lines(rows: "list[dict[str, object]]") -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_lines_keep_their_order_and_get_their_scores(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of(Direction.BACKWARD)
    source, out = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl"
    source.write_text(as_lines(ROWS))

    result = score(folder, "--in", source, "--out", out)

    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "score"} for row in written] == ROWS
    with megaback.load_scorer(folder, device="cpu") as scorer:
        (expected,) = scorer.score([Pair("Say who. a map", "My younger sister.")])
    assert written[1]["score"] == expected.to_dict()
    assert set(written[0]["score"]) == {
        *("log_probability", "per_token", "per_byte", "prior_log_probability", "log_ratio"),
        *("tokens", "bytes"),
    }
    assert "of its own" not in result.stderr
    piped = score(folder, "--in", "-", "--out", "-", lines=source.read_text())
    assert piped.stdout == out.read_text()


def test_an_existing_score_is_replaced_and_reported(folder_of: FolderOf) -> None:
    lines = as_lines([{**ROWS[0], "score": 5}, ROWS[1]])
    result = score(folder_of(Direction.BACKWARD), "--in", "-", "--out", "-", lines=lines)
    assert isinstance(json.loads(result.stdout.splitlines()[0])["score"], dict)
    assert "1 row had a key 'score' of its own, which was replaced\n" in result.stderr


def test_a_forward_model_scores_the_answer(folder_of: FolderOf) -> None:
    result = score(
        folder_of(Direction.FORWARD), "--in", "-", "--out", "-", "--no-prior", lines=as_lines(ROWS)
    )
    first = json.loads(result.stdout.splitlines()[0])
    assert first["score"]["bytes"] == len(ROWS[0]["answer"])  # type: ignore[arg-type]
    assert "log_ratio" not in first["score"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ('["a"]', "a JSON list"),
        ('{"question": "a"}', "no 'answer'"),
        ('{"question": 3, "answer": "b"}', "'question' is of type int"),
        ('{"question": "a", "answer": " "}', "'answer' is empty"),
        ('{"question": null, "answer": "b"}', "'question' is null"),
        ('{"instruction": "a", "output": 3}', "'output'"),
        (json.dumps({"question": "a map " * 40, "answer": "b"}), "model's context of 64"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_is_written(
    line: str, reason: str, folder_of: FolderOf, tmp_path: Path
) -> None:
    source, out = tmp_path / "pairs.jsonl", tmp_path / "scored.jsonl"
    source.write_text(as_lines(ROWS) + f"\n{line}\n" + as_lines(ROWS))

    result = score(folder_of(Direction.BACKWARD), "--in", source, "--out", out)

    assert result.exit_code == 23, result.output
    assert f"megaback: error: {source}:5: " in result.stderr
    assert reason in result.stderr
    assert "--on-bad-record skip" in result.stderr
    assert list(tmp_path.iterdir()) == [source]
    skipped = score(
        folder_of(Direction.BACKWARD), "--in", source, "--out", out, "--on-bad-record", "skip"
    )
    assert skipped.exit_code == 0
    assert f"skipped: {source}:5: " in skipped.stderr
    assert "6 pairs scored in float32, 1 lines skipped" in skipped.stderr
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("content", "name", "exit_code"),
    [(b"", "a.jsonl", 21), (b"\x1f\x8b\x08", "a.jsonl.gz", 22), (None, "a.jsonl", 20)],
)
def test_an_unreadable_input_is_refused(
    content: "bytes | None", name: str, exit_code: int, folder_of: FolderOf, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = score(
        folder_of(Direction.BACKWARD), "--in", tmp_path / name, "--out", tmp_path / "out"
    )
    assert (result.exit_code, name in result.stderr) == (exit_code, True), result.output
    assert not (tmp_path / "out").exists()


def test_an_empty_file_name_is_refused(folder_of: FolderOf) -> None:
    result = score(folder_of(Direction.BACKWARD), "--in", "", "--out", "-")
    assert (result.exit_code, "'--in': it is empty" in result.stderr) == (2, True)


def test_the_input_is_not_replaced(folder_of: FolderOf, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text(as_lines(ROWS))
    result = score(folder_of(Direction.BACKWARD), "--in", source, "--out", source)
    assert result.exit_code == 44
    assert source.read_text() == as_lines(ROWS)


def test_a_file_of_only_bad_lines_leaves_no_output(folder_of: FolderOf, tmp_path: Path) -> None:
    source, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    skip = ("--on-bad-record", "skip")
    for lines in ("{\n", '{\n{"question": "a", "answer": " "}\n'):
        source.write_text(lines)
        result = score(folder_of(Direction.BACKWARD), "--in", source, "--out", out, *skip)
        assert result.exit_code == 21, result.output
        number = lines.count("\n")
        assert f"all {number} lines are invalid" in result.stderr
        assert f"the first error: {source}:1: not valid JSON" in result.stderr
        assert list(tmp_path.iterdir()) == [source]
