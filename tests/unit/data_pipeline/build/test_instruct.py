"""`megaback instruct build`: from rows and chats to shards of whole examples."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.build.instruct import main
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import BadRecordError, ConfigError, SourceUnreadableError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS, Manifest
from data_pipeline.shards.recompress import recompress
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.chat_format import ChatFormat, ParsedExample
from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.builds import Codecs, build_here, hashes, write_records
from tests.helpers.stored import document_ids

Records = list[dict[str, object]]


@pytest.fixture(scope="module")
def rows(english_documents: list[str]) -> Records:
    """Rows with input and without; the instruction asks for the response's last words."""
    generator = random.Random(8)
    return [
        {
            "instruction": f"What of {' '.join(text.split()[-3:])}?",
            "input": generator.choice(["", None, "the long letter, a clock"]),
            "output": text[:200],
            "dataset": "test",
        }
        for text in english_documents[:120]
    ]


def settings_of(source: Path, codec: TextCodec, **changed: object) -> BuildSettings:
    values: dict[str, object] = {
        "sources": (WeightedSource(str(source)),),
        "tokenizer_sha256": codec.format.tokenizer_sha256,
        "direction": codec.format.direction.value,
        "unit": codec.format.unit.value,
        "val_fraction": 0.2,
        "frame_tokens": 1024,
        "shard_tokens": 3000,
        "on_bad_record": "skip",
        "examples": ExampleColumns(),
        "row_tokens": 256,
        **changed,
    }
    return BuildSettings(**values)  # type: ignore[arg-type]


def examples_of(folder: Path) -> dict[str, list[ParsedExample]]:
    form = ChatFormat(DataSet.open(folder).codec())
    return {
        split: [form.parse(ids) for ids in document_ids(DataSet.open(folder), split)]
        for split in SPLITS
    }


def expected_of(rows: Records) -> list[tuple[str, str]]:
    pairs = [
        (f"{row['instruction']} {row['input'] or ''}".strip(), str(row["output"]).strip())
        for row in rows
    ]
    return sorted(pairs)


def pairs_of(examples: list[ParsedExample]) -> list[tuple[str | None, str | None]]:
    assert all(example.is_complete for example in examples)
    return sorted((example.instruction, example.response) for example in examples)  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("unit", list(Unit))
def test_every_row_becomes_one_example_in_one_of_the_sets(
    tmp_path: Path, rows: Records, codec: Codecs, name: str, unit: Unit
) -> None:
    source = write_records(tmp_path / name, rows)
    chosen = codec(unit=unit)
    build_here(settings_of(source, chosen), chosen, tmp_path / "out")
    found = examples_of(tmp_path / "out")
    assert pairs_of([*found["train"], *found["val"]]) == expected_of(rows)
    assert 5 < len(found["val"]) < 50
    verify_data_set(tmp_path / "out", workers=1)


def test_a_forward_models_examples_hold_the_same_texts(
    tmp_path: Path, rows: Records, codec: Codecs
) -> None:
    chosen = codec(Direction.FORWARD)
    source = write_records(tmp_path / "rows.jsonl", rows)
    build_here(settings_of(source, chosen), chosen, tmp_path / "out")
    found = examples_of(tmp_path / "out")
    assert pairs_of([*found["train"], *found["val"]]) == expected_of(rows)


def test_parquet_may_mix_chats_and_rows(tmp_path: Path, codec: Codecs) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    records: Records = [
        {"messages": chat, "instruction": None, "output": None},
        {"messages": None, "instruction": "Where?", "output": "Here."},
    ]
    source = write_records(tmp_path / "mixed.parquet", records)
    build_here(settings_of(source, codec(), val_fraction=0.0), codec(), tmp_path / "out")
    assert pairs_of(examples_of(tmp_path / "out")["train"]) == [("Where?", "Here."), ("Who?", "I.")]


def test_excluded_examples_are_counted_by_reason(
    tmp_path: Path, rows: Records, codec: Codecs
) -> None:
    bad: Records = [
        {"instruction": "", "output": "x"},
        {"instruction": "x", "output": " \n"},
        {"instruction": "Long?", "output": "a long letter " * 200},
        {"instruction": "Broken", "output": None},
        {"text": "another thing"},
    ]
    source = write_records(tmp_path / "rows.jsonl", [*rows[:20], *bad])
    manifest = build_here(settings_of(source, codec()), codec(), tmp_path / "out")
    assert manifest.excluded == {"bad_record": 2, "empty": 2, "too_long": 1}
    assert {cause: tally.first for cause, tally in manifest.skipped["parts"].items()} == {
        "example longer than `context_tokens`": ("rows.jsonl:23",),
        "example without an instruction or a response": ("rows.jsonl:21", "rows.jsonl:22"),
    }
    assert sum(manifest.total(split)["documents"] for split in SPLITS) == 20
    stopping = settings_of(source, codec(), on_bad_record="stop")
    with pytest.raises(BadRecordError, match=r"rows\.jsonl:24"):
        build_here(stopping, codec(), tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_skipped_parts_of_rows_are_counted_by_cause_with_places(
    tmp_path: Path, codec: Codecs, a_task_a_file: None, workers: int, suffix: str
) -> None:
    user, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}
    call = {"role": "assistant", "content": None}
    chats = [[user, answer, user, call], [user, answer], [user, call, user, answer, user]]
    for number in range(4):
        records: Records = [{"messages": chat} for chat in chats]
        write_records(tmp_path / "rows" / f"{number}.{suffix}", records)
    settings = settings_of(tmp_path / "rows", codec(), val_fraction=0.0)
    manifest = build_here(settings, codec(), tmp_path / "out", workers)
    parts = manifest.skipped["parts"]
    counts = {cause.split(",")[0]: tally.count for cause, tally in parts.items()}
    assert counts == {"exchange whose answer has no text": 8, "question without an answer": 4}
    assert manifest.total("train")["documents"] == 12
    places = [":1", ":3", ":1"] if suffix == "jsonl" else [" row 0", " row 2", " row 0"]
    first = parts["exchange whose answer has no text, such as a tool call"].first
    assert first == tuple(
        f"{tmp_path / 'rows' / f'{number}.{suffix}'}{place}"
        for number, place in zip((0, 0, 1), places, strict=True)
    )
    assert manifest.excluded == {}


def test_the_bytes_do_not_depend_on_workers_or_on_an_interruption(
    tmp_path: Path,
    rows: Records,
    codec: Codecs,
    a_task_a_file: None,
) -> None:
    source = tmp_path / "rows"
    for number in range(4):
        write_records(source / f"{number}.jsonl", rows[number::4])
    settings = settings_of(source, codec())
    build_here(settings, codec(), tmp_path / "alone", workers=1)
    build_here(settings, codec(), tmp_path / "both", workers=3)
    expected = hashes(tmp_path / "alone")
    assert hashes(tmp_path / "both") == expected
    killed = tmp_path / "both"
    (killed / "manifest.json").unlink()
    (killed / ".build" / "task-00002.json").unlink()
    next(killed.glob("train-00001-*.zst")).write_bytes(b"half")
    build_here(settings, codec(), killed)
    assert hashes(killed) == expected


def test_recompressing_keeps_examples_and_fingerprint(
    tmp_path: Path, rows: Records, codec: Codecs
) -> None:
    source = write_records(tmp_path / "rows.jsonl", rows)
    before = build_here(settings_of(source, codec()), codec(), tmp_path / "out")
    recompress(tmp_path / "out", tmp_path / "small", Compression(level=19), workers=1)
    after = Manifest.load(tmp_path / "small")
    assert after.fingerprint == before.fingerprint
    assert after.total("train")["loss_tokens"] == before.total("train")["loss_tokens"] > 0
    assert examples_of(tmp_path / "small") == examples_of(tmp_path / "out")
    verify_data_set(tmp_path / "small", workers=1)


def test_a_source_without_the_columns_is_refused(tmp_path: Path, codec: Codecs) -> None:
    (tmp_path / "a.txt").write_text("Just text.")
    write_records(tmp_path / "a.parquet", [{"prompt": "x", "answer": "y"}])
    for name, message in (("a.txt", "no columns, so no instructions"), ("a.parquet", "`columns`")):
        with pytest.raises(SourceUnreadableError, match=message):
            build_here(settings_of(tmp_path / name, codec()), codec(), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.fixture
def instruct(tokenizer_path: Path) -> Callable[..., str]:
    """`instruct(*arguments)`: what the command prints."""

    def run(*arguments: object) -> str:
        command = [*map(str, arguments), "--tokenizer", str(tokenizer_path), "--workers", "1"]
        result = CliRunner().invoke(main, command)
        return result.output

    return run


def test_the_val_set_is_exactly_the_held_out_rows(
    tmp_path: Path, rows: Records, instruct: Callable[..., str]
) -> None:
    source = write_records(tmp_path / "train.jsonl", rows[20:])
    held_out = write_records(tmp_path / "val.jsonl", rows[:20])
    out = tmp_path / "out"
    printed = instruct("--source", source, "--val-source", held_out, "--out", out)
    assert "val: 20 examples" in printed
    assert "backchat.yaml init_from=BASE run=runs/out" in printed  # no base is near
    found = examples_of(out)
    assert pairs_of(found["val"]) == expected_of(rows[:20])
    assert pairs_of(found["train"]) == expected_of(rows[20:])


@pytest.mark.parametrize("given", ["rows.jsonl", "link.jsonl", "../data", "../data/r*.jsonl"])
def test_a_source_in_both_sets_is_refused(
    tmp_path: Path, rows: Records, tokenizer_path: Path, given: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = write_records(folder / "rows.jsonl", rows[:9])
    if given == "link.jsonl":
        (folder / given).symlink_to(source)
    command = ["--source", source, "--val-source", folder / given, "--out", tmp_path / "out"]
    result = CliRunner().invoke(main, [*map(str, command), "--tokenizer", str(tokenizer_path)])
    assert result.exit_code == ConfigError.exit_code, result.output
    assert "is in both --source and --val-source" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_maps_columns_and_refuses_a_context_that_does_not_fit(
    tmp_path: Path, instruct: Callable[..., str]
) -> None:
    records: Records = [{"prompt": f"Go {n}.", "answer": "Gone."} for n in range(9)]
    source = write_records(tmp_path / "rows.jsonl", records)
    arguments = ("--source", source, "--columns", "instruction=prompt,output=answer")
    printed = instruct(*arguments, "--out", tmp_path / "out", "--val-fraction", 0)
    assert "train: 9 examples" in printed
    assert "--context-tokens is 1000" in instruct(
        *arguments, "--out", tmp_path / "other", "--context-tokens", 1000
    )
    assert not (tmp_path / "other").exists()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["settings"]["row_tokens"] == 1024


def test_an_error_for_missing_columns_suggests_others(
    tmp_path: Path, instruct: Callable[..., str]
) -> None:
    chat = [{"from": "human", "value": "Who?"}, {"from": "bing", "value": "I."}]
    for name in ("rows.jsonl", "rows.parquet"):
        source = write_records(tmp_path / name, [{"conversations": chat}] * 2)
        printed = instruct("--source", source, "--out", tmp_path / "out", "--val-fraction", 0)
        assert "perhaps --columns messages=conversations" in printed
        arguments = ("--source", source, "--columns", "messages=conversations")
        printed = instruct(*arguments, "--out", tmp_path / f"{name}.out", "--val-fraction", 0)
        assert "train: 2 examples" in printed
