"""A run's records name its code, base, checkpoint and starts."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.faults.exit_record import record_exit, record_start
from megaback.tracking import code_version as code
from megaback.tracking.lineage import lineage
from tests.helpers.run_config import run_config


def identity(description: Path, step: int) -> dict[str, object]:
    digest = hashlib.sha256(description.read_bytes()).hexdigest()
    return {"path": str(description.parent), "step": step, "sha256": digest, "data": None}


def test_a_first_start_has_no_ancestors(tmp_path: Path) -> None:
    record_start(tmp_path, step=0)
    found = lineage(run_config(tmp_path), 0)

    assert (found["base"], found["checkpoint"], found["restarts"]) == (None, None, 0)


def test_a_start_names_its_checkpoint_by_content_and_all_starts(
    tmp_path: Path, save: Callable[..., Path]
) -> None:
    target = save(tmp_path, 10)
    save(tmp_path, 20)
    for step in (0, 10):
        record_start(tmp_path, step=step)
        record_exit(tmp_path, 75, "preempted", "SIGTERM came", 0)
    found = lineage(run_config(tmp_path), 10)

    assert found["checkpoint"] == identity(target / "meta.json", 10)
    assert found["restarts"] == 1
    assert [start["step"] for start in found["starts"]] == [0, 10]


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/latest", "checkpoints/best"])
def test_a_base_is_the_checkpoint_of_its_path(
    name: str, tmp_path: Path, save: Callable[..., Path]
) -> None:
    older, newest = save(tmp_path, 10), save(tmp_path, 20)
    (tmp_path / "checkpoints/best").write_text(older.name + "\n")
    meant = older if name.endswith("best") else newest
    found = lineage(run_config(tmp_path / "run", init_from=tmp_path / name), 0)

    assert found["base"] == identity(meant / "meta.json", 20 if meant == newest else 10)


def test_a_base_may_be_a_converted_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"step": 7}))
    found = lineage(run_config(tmp_path / "run", init_from=tmp_path), 0)

    assert found["base"] == identity(tmp_path / "config.json", 7)
    (tmp_path / "SHA256SUMS").write_text("00  model.safetensors\n")  # config.json has no hashes
    found = lineage(run_config(tmp_path / "run", init_from=tmp_path), 0)

    assert found["base"] == identity(tmp_path / "SHA256SUMS", 7)


def test_a_base_without_a_description_is_named_by_its_path(tmp_path: Path) -> None:
    found = lineage(run_config(tmp_path / "run", init_from=tmp_path / "gone"), 0)

    assert found["base"] == {
        "path": str(tmp_path / "gone"),
        "step": None,
        "sha256": None,
        "data": None,
    }


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, used as the root of the code."""
    (tmp_path / "code.py").write_text("a = 1\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path


def test_the_version_of_a_checkout_is_its_commit(checkout: Path) -> None:
    head = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    version = code.code_version()

    assert version["commit"] == head.stdout.strip()
    assert (version["is_changed"], version["untracked"]) == (False, [])
    assert code.code_changes() == ""


def test_changes_since_the_commit_are_recorded(checkout: Path) -> None:
    (checkout / "code.py").write_text("a = 2\n")
    (checkout / "other.py").write_text("")
    version = code.code_version()

    assert (version["is_changed"], version["untracked"]) == (True, ["other.py"])
    assert "+a = 2" in code.code_changes()


def test_outside_a_checkout_there_is_only_the_version_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)

    assert set(code.code_version()) == {"megaback", "python"}
    assert code.code_changes() == ""


def test_without_git_there_is_only_the_version_of_the_package(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")

    assert set(code.code_version()) == {"megaback", "python"}
    assert code.code_changes() == ""
