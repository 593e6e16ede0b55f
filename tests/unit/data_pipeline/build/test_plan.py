"""Build plans: even cuts, the plan file, and the commands that use it."""

import json
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_pipeline.build import command as build
from data_pipeline.build import plan_command
from data_pipeline.build.plan import Plan, cut_evenly, make_plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import (
    OutputExistsError,
    ShardsMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources.documents import Slice
from data_pipeline.sources.weighted import WeightedSource
from tests.helpers.builds import Codecs, documents_of, make_settings, write_records

Invoke = Callable[..., Result]

sizes_bytes = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60)
counts = st.integers(1, 80)


@given(sizes=sizes_bytes, num_tasks=st.none() | counts)
def test_every_portion_is_in_one_task(sizes: list[int], num_tasks: int | None) -> None:
    assert sum(cut_evenly(sizes, num_tasks)) == len(sizes)


@given(sizes=sizes_bytes, num_tasks=counts)
def test_the_requested_number_of_tasks_is_made(sizes: list[int], num_tasks: int) -> None:
    assert len(cut_evenly(sizes, num_tasks)) == num_tasks


@given(sizes=sizes_bytes)
def test_no_task_is_empty_unless_their_number_is_requested(sizes: list[int]) -> None:
    assert min(cut_evenly(sizes)) > 0


@given(sizes=sizes_bytes)
def test_small_files_share_few_tasks_by_default(sizes: list[int]) -> None:
    small = [size % 1000 for size in sizes]
    assert len(cut_evenly(small)) == (1 if any(small) else len(small))


@given(sizes=sizes_bytes.filter(any), num_tasks=counts)
def test_tasks_differ_from_an_even_share_by_less_than_one_portion(
    sizes: list[int], num_tasks: int
) -> None:
    tasks = _bytes_of_tasks(sizes, cut_evenly(sizes, num_tasks))
    tolerance = 1 + 1e-9
    assert max(tasks) <= (sum(sizes) / num_tasks + max(sizes)) * tolerance


@given(size=st.integers(1, 1 << 30), portions=st.integers(1, 200), num_tasks=counts)
def test_equal_portions_are_dealt_evenly(size: int, portions: int, num_tasks: int) -> None:
    taken = cut_evenly([size] * portions, num_tasks)
    assert max(taken) - min(taken) <= 1


def _bytes_of_tasks(sizes: list[int], taken: tuple[int, ...]) -> list[int]:
    stops = [sum(taken[:number]) for number in range(len(taken) + 1)]
    return [sum(sizes[start:stop]) for start, stop in pairwise(stops)]


def is_encodable(name: str) -> bool:
    """Whether a name is valid as a path."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


names = st.text(max_size=12)
slices = st.builds(
    Slice,
    kind=st.sampled_from(["novels", "pydocs", "parquet", "jsonl", "text", "hub"]),
    path=names.map(lambda name: f"/{name}".replace("\0", "")).filter(is_encodable),
    start=st.integers(0, 1 << 40),
    stop=st.integers(0, 1 << 40),
    size_bytes=st.integers(0, 1 << 50),
    stamp=names,
)
all_settings = st.builds(
    BuildSettings,
    sources=st.tuples(
        st.builds(WeightedSource, names, st.floats(1e-6, 10)),
        st.builds(WeightedSource, names, st.floats(1e-6, 10)),
    ),
    tokenizer_sha256=names,
    val_fraction=st.floats(0, 1, exclude_max=True),
    languages=st.lists(names, max_size=3).map(tuple),
    min_language_score=st.none() | st.floats(-1e30, 1e30),
    max_characters=st.none() | st.integers(1, 1 << 40),
    deduplicate=st.booleans(),
    limit_documents=st.none() | st.integers(1, 1 << 60),
    limit_tokens=st.none() | st.integers(1, 1 << 60),
)


@given(
    settings=all_settings,
    inputs=st.tuples(st.lists(slices, max_size=6), st.lists(slices, max_size=6)),
    num_tasks=st.none() | st.integers(1, 9),
)
@hypothesis_settings(max_examples=50)
def test_a_saved_plan_loads_equal(
    settings: BuildSettings,
    inputs: tuple[list[Slice], list[Slice]],
    num_tasks: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    frozen = (tuple(inputs[0]), tuple(inputs[1]))
    portions = Plan(
        settings=settings, inputs=frozen, task_portions=(), requested_tasks=num_tasks
    ).portions
    taken = cut_evenly([portion.piece.size_bytes for portion in portions], num_tasks)
    written = Plan(settings=settings, inputs=frozen, task_portions=taken, requested_tasks=num_tasks)
    out = tmp_path_factory.getbasetemp() / "plan"
    out.mkdir(exist_ok=True)
    (out / "plan.json").write_text(written.to_json(), encoding="utf-8")
    assert Plan.load(out) == written


@given(settings=all_settings, pieces=st.lists(slices, min_size=1, max_size=8), num_tasks=counts)
def test_tasks_hold_the_portions_in_order(
    settings: BuildSettings, pieces: list[Slice], num_tasks: int
) -> None:
    whole = Plan(
        settings=settings, inputs=(tuple(pieces), ()), task_portions=(), requested_tasks=num_tasks
    )
    taken = cut_evenly([portion.piece.size_bytes for portion in whole.portions], num_tasks)
    tasks = Plan(
        settings=settings, inputs=whole.inputs, task_portions=taken, requested_tasks=num_tasks
    ).tasks
    assert tuple(portion for task in tasks for portion in task.portions) == whole.portions


def test_a_task_hash_depends_on_the_settings(source: Path, codec: Codecs) -> None:
    shas = {
        make_plan(make_settings(source, codec(), **changed), 1).tasks[0].sha256
        for changed in ({}, {"deduplicate": True}, {"min_characters": 2}, {"limit_tokens": 9})
    }
    assert len(shas) == 4


def test_a_task_hash_does_not_depend_on_the_spelling_of_the_source(
    source: Path, codec: Codecs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    relative = make_plan(make_settings(source.name, codec()), 2)
    absolute = make_plan(make_settings(source, codec()), 2)
    assert [task.sha256 for task in relative.tasks] == [task.sha256 for task in absolute.tasks]


@pytest.fixture
def invoke(
    in_threads: None, source: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Invoke:
    """`invoke(command, *words)`: a command in this process; "{source}" and the like filled in."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)

    def run(command: str, *words: object) -> Result:
        known = {"plan": plan_command.main, "build": build.main}
        return CliRunner().invoke(known[command], [str(word) for word in words])

    return run


@pytest.fixture
def given_source(source: Path, tokenizer_path: Path) -> tuple[object, ...]:
    return ("--source", source, "--tokenizer", tokenizer_path)


def test_a_planned_build_needs_only_its_folder(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    assert invoke("plan", *given_source, "--out", out).exit_code == 0
    assert invoke("build", "--out", out).exit_code == 0
    assert (out / "manifest.json").exists()


def test_planning_writes_no_shards(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    invoke("plan", *given_source, "--out", tmp_path / "shards")
    names = {path.name for path in (tmp_path / "shards").iterdir()}
    assert names == {"plan.json", "tokenizer.model", ".build"}


def test_planning_again_reports_the_existing_plan(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    invoke("plan", *given_source, "--out", tmp_path / "shards")
    result = invoke("plan", *given_source, "--out", tmp_path / "shards")
    assert "already in" in result.output


def test_a_build_without_a_source_in_an_empty_folder_suggests_options(
    invoke: Invoke, tmp_path: Path
) -> None:
    result = invoke("build", "--out", tmp_path)
    assert result.exit_code == ShardsMissingError.exit_code
    assert "megaback shards build --source" in result.output


@pytest.mark.parametrize(
    "words",
    [("--direction", "forward"), ("--deduplicate",), ("--val-fraction", "0.01")],
    ids=lambda words: words[0],
)
def test_a_planned_build_refuses_settings_by_name(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path, words: tuple[str, ...]
) -> None:
    invoke("plan", *given_source, "--out", tmp_path / "shards")
    result = invoke("build", "--out", tmp_path / "shards", *words)
    assert result.exit_code == 2
    assert words[0] in result.output


@pytest.mark.parametrize("given_again", [True, False], ids=["with a source", "without a source"])
def test_a_number_of_tasks_other_than_the_plans_is_refused(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path, given_again: bool
) -> None:
    out = tmp_path / "shards"
    invoke("plan", *given_source, "--out", out, "--tasks", 3)
    result = invoke("build", *(given_source if given_again else ()), "--out", out, "--tasks", 4)
    assert result.exit_code == OutputExistsError.exit_code
    assert "3 tasks, not 4" in result.output


def test_overwriting_a_plan_may_change_its_number_of_tasks(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    invoke("plan", *given_source, "--out", out, "--tasks", 3)
    invoke("plan", *given_source, "--out", out, "--tasks", 4, "--overwrite")
    assert Plan.load(out).num_tasks == 4


def test_overwrite_without_a_plan_makes_the_requested_number_of_tasks(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    invoke("plan", *given_source, "--out", tmp_path / "shards", "--tasks", 4, "--overwrite")
    assert Plan.load(tmp_path / "shards").num_tasks == 4


def test_the_plan_of_a_finished_data_set_is_not_overwritten(
    invoke: Invoke, given_source: tuple[object, ...], tmp_path: Path
) -> None:
    invoke("build", *given_source, "--out", tmp_path / "shards")
    result = invoke("plan", *given_source, "--out", tmp_path / "shards", "--overwrite")
    assert result.exit_code == OutputExistsError.exit_code


@pytest.fixture
def planned(
    invoke: Invoke, tokenizer_path: Path, english_documents: list[str], tmp_path: Path
) -> Path:
    """The folder of a plan of two files beside it."""
    for number in range(2):
        records = [{"text": text} for text in english_documents[number * 20 :][:20]]
        write_records(tmp_path / "source" / f"{number}.jsonl", records)
    words = ("--source", tmp_path / "source", "--tokenizer", tokenizer_path)
    result = invoke("plan", *words, "--out", tmp_path / "shards", "--tasks", 2)
    assert result.exit_code == 0, result.output
    return tmp_path / "shards"


def test_a_file_that_was_added_after_the_plan_is_not_read(invoke: Invoke, planned: Path) -> None:
    write_records(planned.parent / "source" / "2.jsonl", [{"text": "added later"}])
    invoke("build", "--out", planned)
    assert "added later" not in [*chain(*documents_of(planned).values())]


def test_a_file_that_was_added_is_read_after_the_plan_was_overwritten(
    invoke: Invoke, planned: Path, tokenizer_path: Path
) -> None:
    source = planned.parent / "source"
    write_records(source / "2.jsonl", [{"text": "added later"}])
    given_again = ("--source", source, "--tokenizer", tokenizer_path)
    invoke("plan", *given_again, "--out", planned, "--overwrite")
    invoke("build", "--out", planned)
    assert "added later" in [*chain(*documents_of(planned).values())]


def test_a_file_that_changed_after_the_plan_is_an_error_that_names_it(
    invoke: Invoke, planned: Path
) -> None:
    changed = write_records(planned.parent / "source" / "1.jsonl", [{"text": "changed"}])
    result = invoke("build", "--out", planned)
    assert result.exit_code == SourceUnreadableError.exit_code
    assert f"{changed}: changed since" in result.output


def test_a_planned_build_resumes_once_a_changed_file_is_restored(
    invoke: Invoke, planned: Path
) -> None:
    path = planned.parent / "source" / "1.jsonl"
    before = path.read_bytes()
    path.write_bytes(b"changed")
    assert invoke("build", "--out", planned).exit_code != 0
    path.write_bytes(before)
    result = invoke("build", "--out", planned)
    assert result.exit_code == 0
    assert "1 tasks were already done" in result.output


def _without(name: str) -> Callable[[dict[str, object]], None]:
    return lambda fields: fields.pop(name) and None


BREAKS: dict[str, Callable[[dict[str, object]], object]] = {
    "another format": lambda fields: fields.update(format="other"),
    "another version": lambda fields: fields.update(version=99),
    "an earlier version": lambda fields: fields.update(version=1),
    "no settings": _without("settings"),
    "no inputs": _without("inputs"),
    "tasks that do not add up": lambda fields: fields.update(task_portions=[1]),
    "tasks that are no numbers": lambda fields: fields.update(task_portions=["1", "1"]),
    "an unknown setting": lambda fields: fields["settings"].update(color="red"),
    "a setting of another kind": lambda fields: fields["settings"].update(val_fraction="x"),
    "a setting out of range": lambda fields: fields["settings"].update(frame_tokens=3),
    "inputs of another source": lambda fields: fields.update(inputs=[]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_malformed_plan_is_refused_by_name(invoke: Invoke, planned: Path, name: str) -> None:
    fields = json.loads((planned / "plan.json").read_text())
    BREAKS[name](fields)
    (planned / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(OutputExistsError, match=str(planned)):
        Plan.load(planned)
