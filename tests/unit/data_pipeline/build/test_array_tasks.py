"""Tasks run one by one, as by the elements of a Slurm array: any order and number."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_pipeline.build import command as build
from data_pipeline.build import finalize, plan_command
from data_pipeline.build.command import build_tasks
from data_pipeline.build.finalize import BUILDERS_LOCK, codec_of_plan
from data_pipeline.build.plan import Plan
from data_pipeline.build.plan_command import claim_plan
from data_pipeline.build.task import STAGED_FOLDER, run_task
from data_pipeline.common.locks import locked
from data_pipeline.errors import ConfigError, ShardsMissingError
from data_pipeline.shards.manifest import Manifest
from tests.helpers.builds import Codecs, build_here, hashes, make_settings

pytestmark = pytest.mark.usefixtures("in_threads")

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(source: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """`invoke(command, *words)` in this process, on the source if the command is "array"."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    commands = {"plan": plan_command.main, "build": build.main, "finalize": finalize.main}

    def run(command: str, *words: object) -> Result:
        if command == "array":
            command = "build"
            words = ("--source", source, "--tokenizer", tokenizer_path, "--tasks", 4, *words)
        return CliRunner().invoke(commands[command], [str(word) for word in words])

    return run


def of_data_set(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in hashes(out).items() if not name.startswith(".build/")}


@pytest.mark.parametrize("changed", [{}, {"deduplicate": True, "limit_documents": 120}], ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_tasks_in_any_order_make_the_data_set_of_a_pool(
    seed: int, changed: dict[str, object], source: Path, codec: Codecs, tmp_path: Path
) -> None:
    settings = make_settings(source, codec(), **changed)
    build_here(settings, codec(), tmp_path / "pool", workers=2, num_tasks=7)
    out = tmp_path / "array"
    frozen, _ = claim_plan(settings, codec(), out, 7)
    for index in random.Random(seed).sample(range(7), 7):
        build_tasks(frozen, range(index, index + 1), codec(), out, workers=1)
    assert of_data_set(out) == of_data_set(tmp_path / "pool")


def test_more_tasks_than_files_make_the_same_documents(
    source: Path, codec: Codecs, finished: Path, tmp_path: Path
) -> None:
    manifest = build_here(make_settings(source, codec()), codec(), tmp_path / "out", num_tasks=20)
    expected = Manifest.load(finished)
    assert [manifest.total(split)["documents"] for split in ("train", "val")] == [
        expected.total(split)["documents"] for split in ("train", "val")
    ]


def test_a_task_that_is_not_the_last_one_leaves_no_manifest(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("array", "--out", tmp_path / "out", "--task-index", 2)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_range_of_tasks_is_done_by_one_command(invoke: Invoke, tmp_path: Path) -> None:
    invoke("array", "--out", tmp_path / "out", "--task-index", "1-3")
    done = {path.name for path in (tmp_path / "out" / ".build").glob("task-*.json")}
    assert done == {f"task-{index:05d}.json" for index in (1, 2, 3)}


def test_the_last_task_finalizes(invoke: Invoke, tmp_path: Path) -> None:
    invoke("array", "--out", tmp_path / "out", "--task-index", "1-3")
    invoke("array", "--out", tmp_path / "out", "--task-index", 0)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_task_of_a_finished_data_set_changes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    invoke("array", "--out", tmp_path / "out", "--task-index", "0-3")
    before = hashes(tmp_path / "out")
    assert invoke("array", "--out", tmp_path / "out", "--task-index", 2).exit_code == 0
    assert hashes(tmp_path / "out") == before


def test_finalizing_too_early_names_the_missing_tasks(invoke: Invoke, tmp_path: Path) -> None:
    invoke("array", "--out", tmp_path / "out", "--task-index", 2)
    result = invoke("finalize", tmp_path / "out")
    assert result.exit_code == ShardsMissingError.exit_code
    assert "3 of 4 tasks" in result.output
    assert "(0, 1, 3)" in result.output


def test_finalizing_a_folder_without_a_plan_suggests_a_build(
    invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("finalize", tmp_path)
    assert result.exit_code == ShardsMissingError.exit_code
    assert "megaback shards build" in result.output


def test_finalizing_again_changes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    invoke("array", "--out", tmp_path / "out", "--task-index", "0-3")
    before = hashes(tmp_path / "out")
    assert invoke("finalize", tmp_path / "out").exit_code == 0
    assert hashes(tmp_path / "out") == before


@pytest.mark.parametrize("given", ["4", "3-4", "99"])
def test_a_task_index_past_the_plan_is_refused(given: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("array", "--out", tmp_path / "out", "--task-index", given)
    assert result.exit_code == ConfigError.exit_code
    assert "4 tasks" in result.output


@pytest.mark.parametrize("given", ["", "x", "-1", "3-1", "1,2", "1-", "1.0"])
def test_a_malformed_task_index_is_refused(given: str, invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("array", "--out", tmp_path / "out", f"--task-index={given}")
    assert result.exit_code == ConfigError.exit_code
    assert "--task-index" in result.output


def test_with_tasks_the_index_is_that_of_the_slurm_array(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    invoke("array", "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out" / ".build").glob("task-*")] == [
        "task-00003.json"
    ]


def test_a_given_index_overrides_that_of_the_slurm_array(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    invoke("array", "--out", tmp_path / "out", "--task-index", 1)
    assert [path.name for path in (tmp_path / "out" / ".build").glob("task-*")] == [
        "task-00001.json"
    ]


def test_an_array_without_tasks_builds_everything(
    invoke: Invoke,
    source: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A whole build may run in a job of an array."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    words = ("--source", source, "--tokenizer", tokenizer_path, "--out", tmp_path / "out")
    invoke("build", *words)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.fixture
def selecting(source: Path, codec: Codecs, tmp_path: Path) -> Plan:
    """A plan of four tasks that stage their shards, in the folder `out`."""
    settings = make_settings(source, codec(), deduplicate=True)
    return claim_plan(settings, codec(), tmp_path / "out", 4)[0]


def test_staged_files_of_a_running_process_are_kept(
    selecting: Plan, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with locked(out / BUILDERS_LOCK, shared=True):
        build_tasks(selecting, range(4), codec(), out, workers=1)
        assert (out / STAGED_FOLDER).exists()


def test_the_last_process_of_a_folder_removes_staged_files(
    selecting: Plan, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with locked(out / BUILDERS_LOCK, shared=True):
        build_tasks(selecting, range(4), codec(), out, workers=1)
    build_tasks(selecting, range(1), codec(), out, workers=1)
    assert not (out / STAGED_FOLDER).exists()


def test_a_folder_that_another_process_cleaned_up_is_not_an_error(
    selecting: Plan, codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without file locks, a process cannot know that another one is still at work."""
    out = tmp_path / "out"

    def too_late(*arguments: object) -> None:
        monkeypatch.setattr(build, "run_task", run_task)
        build_tasks(selecting, range(4), codec(), out, workers=1)
        raise FileNotFoundError(2, "No such file or directory", str(out / STAGED_FOLDER))

    monkeypatch.setattr(build, "run_task", too_late)
    assert build_tasks(selecting, range(1), codec(), out, workers=1) == Manifest.load(out)


def test_a_plan_with_another_tokenizer_is_refused(selecting: Plan, tmp_path: Path) -> None:
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"another one")
    with pytest.raises(Exception, match="tokenizer"):
        codec_of_plan(selecting, tmp_path / "out")
