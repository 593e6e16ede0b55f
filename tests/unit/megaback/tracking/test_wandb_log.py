"""wandb's logs are read and truncated, wherever a kill has left them."""

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wandb.proto.wandb_internal_pb2 import Record

from megaback.tracking.wandb_log import Segment, cut_back, read_records, read_segments

BLOCK_BYTES = 32 * 1024
HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)


def row(step: int, num_bytes: int) -> Record:
    """A step of about `num_bytes`."""
    record = Record(num=step)
    record.history.step.num = step
    record.history.item.add(key="loss", value_json="1" * num_bytes)
    return record


def other() -> Record:
    """A record other than a step."""
    record = Record()
    record.output_raw.line = "step 3 of 4"
    return record


def log_of(records: list[Record]) -> bytes:
    """A log, written according to LevelDB's documentation."""
    log = bytearray(HEADER)
    for record in records:
        rest, is_first = record.SerializeToString(), True
        while rest or is_first:
            left = BLOCK_BYTES - len(log) % BLOCK_BYTES
            if left < 7:
                log += bytes(left)
                continue
            piece, rest = rest[: left - 7], rest[left - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[
                is_first, not rest
            ]
            checksum = zlib.crc32(bytes([kind]) + piece)
            log += struct.pack("<IHB", checksum, len(piece), kind) + piece
            is_first = False
    return bytes(log)


def write_log(run: Path, log: bytes, folder: str = "offline-run-20260102_030405-abc") -> Path:
    path = run / "wandb" / folder / "run-abc.wandb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(log)
    return path


def only_segment(run: Path) -> Segment:
    (segment,) = read_segments(run, "abc")
    return segment


# Small ones, and some that fill blocks to their last bytes or go over several.
SIZES = st.lists(
    st.one_of(st.integers(0, 300), st.integers(BLOCK_BYTES - 80, BLOCK_BYTES), st.just(90_000)),
    min_size=1,
    max_size=8,
)


@given(sizes=SIZES, kept_share=st.floats(0, 1))
def test_a_truncated_log_is_read_to_its_end(
    sizes: list[int], kept_share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = [row(step, size) for step, size in enumerate(sizes)]
    whole = log_of(records)
    path = write_log(tmp_path_factory.mktemp("run"), whole[: int(len(whole) * kept_share)])

    found = [record for _, record in read_records(path)]

    assert found == records[: len(found)]
    ends = [len(log_of(records[:count])) for count in range(len(records) + 1)]
    assert len(found) == sum(end <= path.stat().st_size for end in ends[1:])


@given(sizes=SIZES, last_step=st.integers(-1, 8))
def test_a_log_that_was_cut_back_has_the_steps_up_to_there(
    sizes: list[int], last_step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    write_log(run, log_of([row(step, size) for step, size in enumerate(sizes)]))
    expected = tuple(range(min(last_step + 1, len(sizes))))

    assert cut_back(only_segment(run), last_step).steps == expected
    assert only_segment(run).steps == expected


def test_other_records_are_kept_up_to_the_cut(tmp_path: Path) -> None:
    kept = [other(), row(1, 5), other(), row(2, 5), other()]
    path = write_log(tmp_path, log_of([*kept, row(3, 5), other()]))

    cut_back(only_segment(tmp_path), 2)

    assert path.read_bytes() == log_of(kept)


@pytest.mark.parametrize("place", [7, 11, 13, 14, 60])
def test_reading_stops_at_a_corrupt_record(tmp_path: Path, place: int) -> None:
    log = bytearray(log_of([row(1, 20), row(2, 20)]))
    log[place] ^= 1
    write_log(tmp_path, bytes(log))

    assert only_segment(tmp_path).steps == (() if place < 40 else (1,))


@pytest.mark.parametrize("num_bytes", [0, 3, 7])
def test_a_log_without_a_complete_header_has_no_steps(tmp_path: Path, num_bytes: int) -> None:
    write_log(tmp_path, HEADER[:num_bytes])

    assert only_segment(tmp_path).steps == ()


def test_a_log_of_another_kind_is_refused_with_its_name(tmp_path: Path) -> None:
    path = write_log(tmp_path, b":W&B\xe1\xbe\x07" + bytes(50))

    with pytest.raises(ValueError, match=r"not a log of a version of wandb") as refused:
        read_segments(tmp_path, "abc")
    assert str(path) in str(refused.value)


def test_segments_are_in_the_order_of_their_starts_online_or_not(tmp_path: Path) -> None:
    folders = ("offline-run-20260103_000000-abc", "run-20260102_000000-abc")
    for number, folder in enumerate(folders):
        write_log(tmp_path, log_of([row(number, 3)]), folder)

    assert [segment.steps for segment in read_segments(tmp_path, "abc")] == [(1,), (0,)]


def test_logs_of_other_runs_and_behind_links_are_ignored(tmp_path: Path) -> None:
    log = log_of([row(step, 3) for step in range(5)])
    other = write_log(tmp_path, log).rename(tmp_path / "wandb" / "other.wandb")
    folder = "offline-run-20260102_030405-xyz"
    (tmp_path / "wandb" / folder).mkdir()
    other = other.rename(tmp_path / "wandb" / folder / "run-xyz.wandb")
    linked = tmp_path / "wandb" / "offline-run-20260102_030405-abc" / "run-abc.wandb"
    linked.symlink_to(other)

    assert read_segments(tmp_path, "abc") == []
    assert read_segments(tmp_path, "*") == []
    assert len(read_segments(tmp_path, "xyz")) == 1


def test_a_segment_is_sent_if_it_was_online_or_synced(tmp_path: Path) -> None:
    offline = write_log(tmp_path, b"")
    assert not only_segment(tmp_path).is_sent
    offline.with_name("run-abc.wandb.synced").touch()
    assert only_segment(tmp_path).is_sent
    write_log(tmp_path, b"", "run-20250102_000000-abc")
    assert read_segments(tmp_path, "abc")[0].is_sent
