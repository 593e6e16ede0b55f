"""Why a run ended stands in its folder, by whoever knew it first."""

from pathlib import Path

from megaback.exit_record import (
    EXIT_NAME,
    HISTORY_NAME,
    read_exit,
    read_history,
    record_exit,
    record_start,
)


def test_the_first_to_know_a_reason_writes_it(tmp_path: Path) -> None:
    assert record_exit(tmp_path, 51, "RankLostError", "rank 1 is dead", rank=0)
    assert not record_exit(tmp_path, 13, "LaunchError", "later")

    ending = read_exit(tmp_path)
    assert ending is not None
    assert (ending["code"], ending["reason"], ending["rank"]) == (51, "rank 1 is dead", 0)


def test_a_start_takes_the_reason_of_the_last_end_away(tmp_path: Path) -> None:
    record_exit(tmp_path, 75, "PreemptedError", "asked to stop")

    record_start(tmp_path, step=20, world_size=2, zero_stage=1)

    assert read_exit(tmp_path) is None


def test_history_has_every_start_and_end(tmp_path: Path) -> None:
    for step in (0, 20):
        record_start(tmp_path, step=step)
        record_exit(tmp_path, 75, "PreemptedError", "asked to stop")

    lines = read_history(tmp_path)
    assert [line["event"] for line in lines] == ["start", "exit", "start", "exit"]
    assert [line["step"] for line in lines if line["event"] == "start"] == [0, 20]


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    record_start(tmp_path, step=0)
    with (tmp_path / HISTORY_NAME).open("a") as file:
        file.write('{"event": "exi')

    assert len(read_history(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_no_further_fault(tmp_path: Path) -> None:
    assert not record_exit(tmp_path / "nowhere", 0, "finished", "trained to the end")
    assert read_exit(tmp_path / "nowhere") is None
    assert read_history(tmp_path / "nowhere") == []


def test_what_is_no_record_is_none(tmp_path: Path) -> None:
    for content in ("", "[1]", "{"):
        (tmp_path / EXIT_NAME).write_text(content)

        assert read_exit(tmp_path) is None
