"""A second start is refused, but a requeued job takes the lock over from its own earlier start."""

from pathlib import Path

import pytest

from megaback.faults.run_lock import lock_holder, lock_run, owns_lock, release_lock


def in_job(patch: pytest.MonkeyPatch, job: str | None, restarts: int = 0) -> None:
    patch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        patch.setenv("SLURM_JOB_ID", job)
    patch.setenv("SLURM_RESTART_COUNT", str(restarts))


@pytest.mark.parametrize(
    ("holder", "second"),
    [
        ((None, 0), (None, 1)),
        (("7", 0), (None, 1)),
        ((None, 0), ("7", 1)),
        (("7", 0), ("8", 1)),
        (("7", 1), ("7", 1)),
        (("7", 2), ("7", 1)),
    ],
)
def test_a_second_start_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    holder: tuple[str | None, int],
    second: tuple[str | None, int],
) -> None:
    in_job(monkeypatch, *holder)
    lock = lock_run(tmp_path)
    assert lock is not None
    in_job(monkeypatch, *second)

    assert lock_run(tmp_path) is None

    assert owns_lock(lock, tmp_path)
    found = lock_holder(tmp_path)
    assert found is not None
    assert (found.job, found.restarts) == holder
    release_lock(lock)
    assert (tmp_path / ".lock").read_bytes() == b""
    again = lock_run(tmp_path)
    assert again is not None
    release_lock(again)


def test_a_requeued_job_takes_the_lock_of_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, "7")
    earlier = lock_run(tmp_path)
    assert earlier is not None
    in_job(monkeypatch, "7", 1)

    newer = lock_run(tmp_path)

    assert newer is not None
    assert owns_lock(newer, tmp_path)
    assert not owns_lock(earlier, tmp_path)
    release_lock(earlier)  # its end does not release the newer one's lock
    in_job(monkeypatch, None)
    assert lock_run(tmp_path) is None
    release_lock(newer)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("text", ["", "poetry", "[]", '{"host": "n1"}', '{"host": 1}'])
def test_a_file_of_another_kind_names_no_holder(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)

    assert lock_holder(tmp_path) is None
