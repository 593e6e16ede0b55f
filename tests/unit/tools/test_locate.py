"""`megaback shards locate`: batches of the reported steps hold the document's tokens."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.loader import Stream
from data_pipeline.loading.mixture import Mixture
from data_pipeline.shards import inspection
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.document_search import (
    StoredDocument,
    document_by_number,
    documents_with_ids,
)
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.text.codec import Direction
from megaback.config_file import load_config
from megaback.data import Data, open_data
from megaback.run_folder import CHECKPOINTS_FOLDER, CONFIG_COPY_NAME, META_NAME, step_name
from tests.helpers.batches import (
    CONTEXT_TOKENS,
    CONTEXTS,
    FRAME_TOKENS,
    QUICKLY,
    DataSet,
    Ids,
    data_set,
    document_shards,
    mirrored,
    write_data_set,
)
from tests.helpers.builds import documents_of
from tests.helpers.loaders import BATCH_ROWS as ROWS_PER_STEP
from tests.helpers.loaders import Corpus, Reading
from tests.helpers.located import (
    CONTEXT_OF_RUN,
    locate,
    located,
    reader_of,
    write_config,
)
from tools.locate import rows_of_document, uses_of_document


@pytest.fixture
def config_path(tmp_path: Path, finished: Path) -> Path:
    """Config of a run on a real build, whose shards end in short frames."""
    return write_config(tmp_path / "config.yaml", str(finished))


def first_of(folder: Path, split: str = "train") -> bytes:
    """Text of the first document of a split without duplicates."""
    texts = documents_of(folder)[split]
    return next(text for text in texts if texts.count(text) == 1).encode("utf-8", "surrogatepass")


@QUICKLY
@given(
    shards=document_shards(),
    epoch=st.integers(0, 2),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_batches_hold_every_token_of_every_document_where_it_is_located(
    shards: list[list[Ids]], epoch: int, world_size: int
) -> None:
    with data_set(shards) as written:
        stream = Stream(written.rows(CONTEXT_TOKENS), *written.table_and_order())
        order, opened = stream.order, stream.rows.frames.data_set
        data = SimpleNamespace(
            streams=[stream],
            mixture=Mixture([1.0]),
            total_steps=10**6,
            read_steps=0,
            branch=None,
        )
        ranks = [written.training(written.store(), rank, world_size) for rank in range(world_size)]
        rank_rows = order.global_batch_rows // world_size
        seen: set[tuple[int, int, int]] = set()
        for number, ids in enumerate(document for of_shard in shards for document in of_shard):
            document = document_by_number(opened, "train", number)
            uses = uses_of_document(data, document, order.global_batch_rows, epoch, world_size)
            held = [token for use in uses for token in range(use.start, use.stop)]
            assert sorted(held) == list(range(len(ids)))
            for use in uses:
                assert order.places(use.step - 1).epoch[use.position] == epoch
                row = ranks[use.position // rank_rows].at(use.step - 1)
                first = (document.start + use.start) % FRAME_TOKENS % CONTEXT_TOKENS
                of_row = row[use.position % rank_rows].ids_T[first:][: use.stop - use.start]
                assert of_row.tolist() == ids[use.start : use.stop].tolist()
                assert use.rank == use.position // rank_rows
                places = {(use.step, use.position, first + at) for at in range(len(of_row))}
                assert not places & seen
                seen |= places


@QUICKLY
@given(
    shards=document_shards(),
    epoch=st.integers(0, 2),
    direction=st.sampled_from(list(Direction)),
    forward_share=st.sampled_from([None, 0.5]),
)
def test_a_whole_document_is_located_in_the_row_that_reads_it(
    shards: list[list[Ids]], epoch: int, direction: Direction, forward_share: float | None
) -> None:
    reading = Reading(are_whole=True, direction=direction, forward_share=forward_share)
    with data_set(shards) as written:
        corpus = Corpus([written], reading)
        loader, stream = corpus.training(), corpus.streams()[0]
        data = SimpleNamespace(
            streams=[stream],
            mixture=Mixture([1.0]),
            total_steps=10**6,
            read_steps=0,
            branch=None,
        )
        for number, ids in enumerate(document for of_shard in shards for document in of_shard):
            document = document_by_number(stream.rows.frames.data_set, "train", number)
            (use,) = uses_of_document(data, document, ROWS_PER_STEP, epoch, None)
            assert stream.order.places(use.step - 1).epoch[use.position] == epoch
            (batch,) = loader.at(use.step - 1)
            row = list(batch.rows(CONTEXT_TOKENS))[use.position]
            text = ids[use.start : use.stop]
            assert len(text) == min(len(ids), CONTEXT_TOKENS + 1)
            is_forward = direction is Direction.FORWARD
            if row.is_forward_N is not None:
                is_forward = bool(row.is_forward_N[0])
            if is_forward:
                text = text[::-1] if forward_share else mirrored(text)
            held = [*row.ids_T.tolist(), int(row.targets_T[-1])]
            assert text.tolist() in [
                held[start : start + len(text)] for start in range(CONTEXT_TOKENS)
            ]


@given(start=st.integers(0, 300), length=st.integers(2, 300), context_tokens=CONTEXTS)
def test_the_rows_of_a_document_hold_each_of_its_tokens_once(
    start: int, length: int, context_tokens: int
) -> None:
    document = StoredDocument(data_set=0, number=0, shard=1, start=start, stop=start + length)
    shard_tokens = np.array([100, 650, 70])
    rows = rows_of_document(document, shard_tokens, FRAME_TOKENS, context_tokens)
    first_of_shard = 2 * FRAME_TOKENS  # the first shard has two frames
    held = [
        token
        for frame, row, first, stop in zip(rows.frame, rows.row, rows.start, rows.stop, strict=True)
        for token in range(
            frame * FRAME_TOKENS + row * context_tokens - first_of_shard,
            frame * FRAME_TOKENS + (row + 1) * context_tokens - first_of_shard,
        )
        if first <= token - start < stop
    ]
    assert held == list(range(start, start + length))


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reported_rows_of_a_real_build_hold_the_documents(
    config_path: Path, finished: Path, epoch: int, world_size: int
) -> None:
    texts = documents_of(finished)["train"]
    row_ids = reader_of(load_config(config_path), world_size)
    for number in random.Random(epoch).sample(range(len(texts)), 8):
        options = ("--epoch", epoch, "--world-size", world_size)
        (found,) = located(config_path, "--document", number, *options)
        ids = inspection.document_at(OpenDataSet.open(finished), "train", number)
        assert (found["document"], found["tokens"]) == (number, len(ids))
        for row in found["rows"]:
            first = (found["shard_tokens"][0] + row["start"]) % CONTEXT_OF_RUN
            held = row_ids(row["step"], row["position"], row["rank"])
            held = held[first : first + row["stop"] - row["start"]]
            assert held.tolist() == ids[row["start"] : row["stop"]].tolist()


def test_the_unread_end_of_a_document_has_its_reason(config_path: Path, finished: Path) -> None:
    lengths = [len(text) for text in documents_of(finished)["train"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)

    result = locate(config_path, "data.rows=documents", "--document", longest)

    assert result.exit_code == 0, result.output
    assert "no step reads the rest of it: the document is longer than a row" in result.stdout


def test_a_document_over_several_frames_is_located_in_all_of_them(
    tmp_path: Path, codec: Callable[..., Any], english_documents: list[str]
) -> None:
    text = " ".join(english_documents[:40])
    ids = codec().encode_document(text)
    documents = [codec().encode_document("before"), ids, codec().encode_document("after")]
    write_real_data_set(tmp_path / "shards", [documents], codec())
    assert len(ids) > 5 * FRAME_TOKENS
    config = write_config(tmp_path / "config.yaml", str(tmp_path / "shards"))
    (found,) = located(config, "--text", "-", "--epoch", 1, text=text.encode())
    row_ids = reader_of(load_config(config), 1)
    held = [
        row_ids(row["step"], row["position"], 0)[
            (len(documents[0]) + row["start"]) % CONTEXT_OF_RUN :
        ][: row["stop"] - row["start"]]
        for row in sorted(found["rows"], key=lambda row: row["start"])
    ]
    assert np.concatenate(held).tolist() == ids.tolist()


def write_real_data_set(folder: Path, shards: list[list[Any]], codec: Any) -> None:
    """Write a trainable data set, with a manifest and a tokenizer."""
    folder.mkdir()
    written = write_data_set(
        folder,
        shards,
        text_format=codec.format,
        begin_id=codec.begin_id,
        end_id=codec.end_id,
    )
    written.manifest.save(folder)
    (folder / "tokenizer.model").write_bytes(codec.model_bytes)


def test_a_document_has_the_same_rows_in_both_directions(config_path: Path, finished: Path) -> None:
    stored = located(config_path, "--document", 5)
    flipped = located(config_path, "data.direction=forward", "--document", 5)
    assert stored == flipped
    config = load_config(config_path, ("data.direction=forward",))
    row_ids = reader_of(config, 1)
    ids = inspection.document_at(OpenDataSet.open(finished), "train", 5)
    row = max(stored[0]["rows"], key=lambda row: row["stop"] - row["start"])
    inner = ids[row["start"] + 1 : row["stop"] - 1].tolist()
    held = row_ids(row["step"], row["position"], 0)[::-1].tolist()
    assert len(inner) > 5
    assert any(held[at : at + len(inner)] == inner for at in range(len(held)))


def test_every_document_is_found_by_its_text(config_path: Path, finished: Path) -> None:
    texts = documents_of(finished)["train"]
    hard = [number for number, text in enumerate(texts) if not text.isascii() or "\r" in text]
    assert len(hard) > 2
    for number in [0, 17, len(texts) - 1, *hard]:
        text = texts[number].encode("utf-8", "surrogatepass")
        same = [other for other, of_other in enumerate(texts) if of_other == texts[number]]
        assert [
            found["document"] for found in located(config_path, "--text", "-", text=text)
        ] == same


def test_text_and_number_locate_the_same_document(
    config_path: Path, finished: Path, tmp_path: Path
) -> None:
    path = tmp_path / "document.txt"
    path.write_bytes(first_of(finished))
    (found,) = by_text = located(config_path, "--text", path)
    assert by_text == located(config_path, "--document", found["document"])


def test_every_duplicate_of_a_text_is_located(config_path: Path, finished: Path) -> None:
    texts = documents_of(finished)["train"]
    text = next(text for text in texts if text and texts.count(text) == 2)
    found = located(config_path, "--text", "-", text=text.encode("utf-8", "surrogatepass"))
    assert [texts[document["document"]] for document in found] == [text] * 2
    assert found[0]["rows"] != found[1]["rows"]


def test_a_missing_text_exits_with_code_20(config_path: Path) -> None:
    result = locate(config_path, "--text", "-", text=b"This text is missing.\n")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (20, "", 1)
    assert "train set" in result.stderr
    assert "line break" in result.stderr


def test_a_text_of_the_other_split_is_reported(config_path: Path, finished: Path) -> None:
    text = first_of(finished, "val")
    result = locate(config_path, "--text", "-", text=text)
    number = documents_of(finished)["val"].index(text.decode())
    assert (result.exit_code, f"document {number} of the val set" in result.stderr) == (20, True)


def test_no_step_reads_a_document_of_the_val_set(config_path: Path) -> None:
    (found,) = located(config_path, "--document", 3, "--split", "val")
    assert (found["document"], found["rows"]) == (3, [])
    shown = locate(config_path, "--document", 3, "--split", "val").stdout
    assert "no step" in shown


def test_frames_are_read_only_if_lengths_match(
    small: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = small.store().data_set
    monkeypatch.setattr(ShardReader, "frame", lambda _reader, frame: pytest.fail(f"read {frame}"))
    nowhere = np.full(13, 7, dtype="<u2")
    assert documents_with_ids([data_set], "train", nowhere) == []


@QUICKLY
@given(shards=document_shards(), data=st.data())
def test_all_documents_with_the_given_ids_are_found(
    shards: list[list[Ids]], data: st.DataObject
) -> None:
    documents = [document for of_shard in shards for document in of_shard]
    chosen = data.draw(st.sampled_from(documents))
    expected = [
        number for number, other in enumerate(documents) if other.tolist() == chosen.tolist()
    ]
    with data_set(shards) as written:
        opened = written.store().data_set
        found = documents_with_ids([opened], "train", chosen.astype("<u2"))
        assert [document.number for document in found] == expected
        assert found == [document_by_number(opened, "train", number) for number in expected]


def test_steps_after_the_end_of_the_run_are_not_reached(
    tmp_path: Path, finished: Path, config_path: Path
) -> None:
    every_row = located(config_path, "--document", 9)[0]["rows"]
    assert all(row["is_reached"] for row in every_row)
    last = max(row["step"] for row in every_row)
    for steps, is_reached in ((last, True), (last - 1, False)):
        short = write_config(tmp_path / "short.yaml", str(finished), steps=steps)
        (found,) = located(short, "--document", 9)
        assert [row["step"] for row in found["rows"]] == [row["step"] for row in every_row]
        assert found["rows"][-1]["is_reached"] == is_reached
        shown = locate(short, "--document", 9).stdout
        assert ("not reached" not in shown) == is_reached


def test_a_run_folder_is_accepted_in_place_of_a_config(config_path: Path, tmp_path: Path) -> None:
    overrides = ("training.seed=5", "batch.context_tokens=64")
    run = tmp_path / "run"
    run.mkdir()
    (run / CONFIG_COPY_NAME).write_text(load_config(config_path, overrides).to_yaml())
    of_run = located(run, "--document", 2)
    assert of_run == located(config_path, *overrides, "--document", 2)
    assert of_run != located(config_path, "--document", 2)


@pytest.mark.parametrize(
    ("meta", "code"), [("{}", 0), ('{"order_version": 2}', 42), ("[]", 41), ("{", 41)]
)
def test_a_run_of_another_order_of_rows_is_refused(
    config_path: Path, tmp_path: Path, meta: str, code: int
) -> None:
    run = tmp_path / "run"
    checkpoint = run / CHECKPOINTS_FOLDER / step_name(7)
    checkpoint.mkdir(parents=True)
    (run / CONFIG_COPY_NAME).write_text(load_config(config_path).to_yaml())
    (checkpoint / META_NAME).write_text(meta)
    result = locate(run, "--document", 2)
    assert result.exit_code == code, result.stderr
    assert (str(run) in result.stderr) == bool(code)


def test_the_text_output_lists_steps_positions_ranks_and_tokens(config_path: Path) -> None:
    (found,) = located(config_path, "--document", 4, "--world-size", 3)
    shown = locate(config_path, "--document", 4, "--world-size", 3).stdout.splitlines()
    assert found["shard"] in shown[0]
    assert "epoch 0" in shown[1]
    assert shown[2:] == [
        f"  step {row['step']:,}, row {row['position']:,} of the batch, rank {row['rank']}: "
        f"tokens {row['start']:,} to {row['stop'] - 1:,}"
        for row in found["rows"]
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 10),
        (["--document", "1", "--text", "-"], 10),
        (["--document", "100000"], 10),
        (["--document", "1", "--shards", "elsewhere"], 10),
        (["--text", "-", "--shards", "elsewhere"], 10),
        (["--document", "1", "--world-size", "5"], 11),
    ],
    ids=str,
)
def test_invalid_requests_are_refused_in_one_line(
    config_path: Path, arguments: list[str], code: int
) -> None:
    result = locate(config_path, *arguments, text=b"")
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1)


def test_a_text_that_is_not_utf_8_is_refused(config_path: Path) -> None:
    result = locate(config_path, "--text", "-", text=b"caf\xe9")
    assert (result.exit_code, result.stderr.count("\n")) == (22, 1)


def test_a_corrupted_shard_is_named(config_path: Path, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    entry = Manifest.load(copy).split("train")[0]
    (copy / entry.file).write_bytes(b"")
    config = write_config(tmp_path / "copy.yaml", str(copy))
    result = locate(config, "--document", 0)
    assert (result.exit_code, entry.file in result.stderr) == (31, True)


def test_the_val_set_is_not_needed(tmp_path: Path, codec: Callable[..., Any]) -> None:
    ids = codec().encode_document("only one")
    write_real_data_set(tmp_path / "shards", [[ids]], codec())
    config = write_config(tmp_path / "config.yaml", str(tmp_path / "shards"), steps=1)
    (found,) = located(config, "--text", "-", text=b"only one")
    assert [row["step"] for row in found["rows"]] == [1]
    data: Data = open_data(load_config(config), 0, 1)
    assert not data.has_val
