"""Maximum bytes per record: lines, elements, texts, pages and rows that are too long."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build import command as build
from data_pipeline.build.plan import Plan, make_plan
from data_pipeline.build.settings import content_settings
from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import BadRecordError, OutputExistsError, SourceUnreadableError
from data_pipeline.sources import json_array
from data_pipeline.sources.documents import Columns
from data_pipeline.sources.json_array import read_array, read_values
from data_pipeline.sources.jsonl import lines, read_records
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES, holds_too_many_values
from data_pipeline.sources.registry import list_slices, read_slice
from data_pipeline.text.codec import TextCodec
from data_pipeline.tokenizer.train_tokenizer import main as train_main
from tests.helpers.builds import build_here, make_settings

Codec = Callable[..., TextCodec]

LIMIT = 2000
LONG = "x" * LIMIT


def read(source: Path, *, html: bool = False) -> tuple[list[str], list[BadRecordError]]:
    """Texts within the limit, and errors of the others, the first of which is also raised."""
    bad: list[BadRecordError] = []
    columns = Columns(html=html)
    slices = list_slices(str(source), columns)
    found = [
        document.text
        for piece in slices
        for document in read_slice(piece, columns, bad.append, LIMIT)
    ]
    if bad:
        stopping = (read_slice(piece, columns, max_record_bytes=LIMIT) for piece in slices)
        with pytest.raises(BadRecordError) as stopped:
            list(chain.from_iterable(stopping))
        assert str(stopped.value) == str(bad[0])
    return found, bad


def record(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def test_a_long_line_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(record("one") + record(LONG) + record("three") + record(LONG).rstrip())
    found, bad = read(path)
    assert found == ["one", "three"]
    advice = "allows; raise the limit if there is memory for 20 times as much, or remove the record"
    assert [str(error) for error in bad] == [
        f"{path}:{line}: longer than `max_record_bytes` {LIMIT} {advice}" for line in (2, 4)
    ]
    assert {error.cause for error in bad} == {"too long"}


def test_a_long_text_and_a_long_page_are_bad(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * LIMIT)
    (tmp_path / "b.txt").write_text("x" * LIMIT + "y")
    (tmp_path / "c.html").write_text(f"<p>{'word ' * (LIMIT // 80)}</p>")
    found, bad = read(tmp_path, html=True)
    assert found == ["x" * LIMIT]
    assert [error.place for error in bad] == [
        f"{tmp_path}/b.txt: longer than `max_record_bytes` {LIMIT} allows",
        f"{tmp_path}/c.html: an HTML page longer than a sixteenth of what `max_record_bytes` "
        f"{LIMIT} allows",
    ]


def test_members_of_a_zip_are_bounded(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", record("one") + record(LONG) + record("three"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.txt", LONG * 2)
    assert read(tmp_path / "a.zip")[0] == ["one", "three"]
    found, (error,) = read(tmp_path / "b.zip")
    assert (found, error.cause) == ([], "too long")


@pytest.mark.parametrize("columns", [{}, {"columns": ["text"]}])
@pytest.mark.parametrize("long", [LONG + "x", "\u00e9" * (LIMIT // 2 + 1)])
def test_a_long_row_is_bad(tmp_path: Path, columns: dict[str, Any], long: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    table = pa.table({"text": ["one", long, "three", "\u00e9" * (LIMIT // 2)]})
    pq.write_table(table, root / "a.parquet")
    config = {"config_name": "all", "data_files": "a.parquet", **columns}
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    found, (error,) = read(Path(f"hf:{root}"))  # both as a file and streamed by `datasets`
    assert found == ["one", "three", "\u00e9" * (LIMIT // 2)]
    assert error.cause == "too long"


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("long", [[LONG], ["{"] * (LIMIT // 6)])
def test_a_long_element_is_an_error_of_the_file(
    tmp_path: Path, spread: bool, long: list[str]
) -> None:
    values = [{"text": "one"}, {"text": "two", "more": long}, {"text": "three"}]
    data = json.dumps(values) if not spread else "".join(json.dumps(v, indent=1) for v in values)
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(SourceUnreadableError, match=r"element 2 (is longer|has more values) than"):
        read(tmp_path)


PARTS = st.lists(st.sampled_from([b"", b"\n", b"a", b"bb", b" ", b"\n\n", b"ccc", b"\xef\xbb\xbf"]))


@given(PARTS, st.integers(0, 6))
def test_lines_equal_those_of_split(parts: list[bytes], maximum: int) -> None:
    whole = b"".join(parts).split(b"\n")
    expected = [
        (number, None if len(line) > maximum else line.removeprefix(b"\xef\xbb\xbf"))
        for number, line in enumerate(whole, start=1)
        if len(line) > maximum or line.removeprefix(b"\xef\xbb\xbf").strip()
    ]
    assert list(lines(parts, maximum)) == expected


VALUES = st.recursive(
    st.none() | st.integers(-9, 999) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=12,
)


@given(st.lists(VALUES), st.integers(8, 200), st.integers(1, 50))
def test_elements_equal_those_of_json_up_to_a_long_one(
    values: list[Any], maximum: int, size: int
) -> None:
    written = [json.dumps(value) for value in values]
    is_long = [len(text) > maximum or holds_too_many_values(text, maximum) for text in written]
    good = is_long.index(True) if any(is_long) else len(values)
    data = f"[{', '.join(written)}]".encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_MIN_READ_CHARACTERS", 1)
        cut = iter([data[start : start + size] for start in range(0, len(data), size)])
        found = []
        try:
            for number, value in read_array(cut, "a.json", maximum):
                found.append(value)
                assert number == len(found)
            message = ""
        except SourceUnreadableError as error:
            message = str(error)
    assert (f"element {good + 1} " in message) == any(is_long)
    assert found == values[:good]


NESTED = """
import sys
from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources.json_array import read_array
from data_pipeline.sources.jsonl import lines, parse_record

MIB = 1 << 20

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0])

before = peak()
for unit in (b"[", b'{"a":', b"[[],", b"9", b" ", b'"'):
    chunk = unit * (MIB // len(unit))
    (number, line), *others = lines([b'{"a": ', *[chunk] * 1024], 32 * MIB)  # a line of a GiB
    assert (number, line, others) == (1, None, [])
    short = b'{"a": ' + unit * (32 * MIB // len(unit) - 8)
    try:
        parse_record(short, "a")
        raise SystemExit("parsed")
    except BadRecordError:
        pass
    if unit != b" ":
        try:
            list(read_array(iter([b"[", *[unit * MIB] * 40]), "a"))
            raise SystemExit("parsed")
        except SourceUnreadableError:
            pass
print((peak() - before) >> 10)
"""


def test_a_line_of_a_gibibyte_takes_bounded_memory_and_no_recursion() -> None:
    result = subprocess.run(
        [sys.executable, "-c", NESTED], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 600


def test_values_are_counted_before_parsing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "more": [' + ",".join(["[]"] * 400) + "]}\n" + record("two"))
    found, (error,) = read(path)
    assert found == ["two"]
    assert error.place == f"{path}:1: more values than `max_record_bytes` {LIMIT} allows"


def test_errors_list_few_of_many_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"{n}" * 100: 0 for n in range(100)}) + "\n")
    with pytest.raises(BadRecordError, match=r"and 80 others") as error:
        list(read_slice(list_slices(str(tmp_path))[0]))
    assert len(str(error.value)) < 2000
    assert shown_names([]) == "none"


def test_a_build_names_the_option_and_resumes_with_more(tmp_path: Path, codec: Codec) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in "abcd":
        (source / f"{name}.jsonl").write_text(record(f"{name} has {'words ' * 200}"))
    (source / "c.jsonl").write_text(record("long " * 1000))
    settings = make_settings(source, codec(), max_record_bytes=LIMIT, val_fraction=0.0)
    out = tmp_path / "out"
    with pytest.raises(BadRecordError, match=r"c.jsonl:1: longer than .*`on_bad_record` skip$"):
        build_here(settings, codec(), out, 4)
    more = make_settings(source, codec(), max_record_bytes=10 * LIMIT, val_fraction=0.0)
    manifest = build_here(more, codec(), out, 4)
    assert sum(shard.documents for shard in manifest.shards) == 4
    assert Plan.load(out).settings.max_record_bytes == 10 * LIMIT
    fresh = build_here(more, codec(), tmp_path / "fresh", 4)
    assert fresh.fingerprint == manifest.fingerprint


def test_skipped_long_records_are_counted_and_part_of_the_result(
    tmp_path: Path, codec: Codec
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(record("short") + record("long " * 1000))
    skipping: dict[str, Any] = {"on_bad_record": "skip", "val_fraction": 0.0}
    settings = make_settings(source, codec(), max_record_bytes=LIMIT, **skipping)
    manifest = build_here(settings, codec(), tmp_path / "out")
    assert manifest.excluded == {"bad_record": 1}
    assert manifest.skipped["records"]["too long"].count == 1
    more = make_settings(source, codec(), **skipping)
    with pytest.raises(OutputExistsError, match=f"skipped records longer .* {LIMIT}; set the same"):
        build_here(more, codec(), tmp_path / "out")


def test_a_setting_that_older_plans_lack_changes_no_task(tmp_path: Path, codec: Codec) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(record("short"))
    plan = make_plan(make_settings(source, codec()))
    fields = json.loads(plan.to_json())
    assert fields["settings"].pop("max_record_bytes") == DEFAULT_MAX_RECORD_BYTES
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    older = Plan.load(tmp_path)
    assert older == plan
    settings = content_settings(plan.settings)
    assert "max_record_bytes" not in settings
    assert settings.keys() == content_settings(replace(plan.settings, max_record_bytes=9999)).keys()
    skipping = replace(plan.settings, max_record_bytes=9999, on_bad_record="skip")
    assert content_settings(skipping)["max_record_bytes"] == 9999


@pytest.mark.parametrize("command", [build.main, train_main])
def test_commands_have_the_option(command: Any) -> None:
    assert "--max-record-bytes" in CliRunner().invoke(command, ["--help"]).output
    refused = CliRunner().invoke(command, ["--max-record-bytes", "1023"])
    assert refused.exit_code == 2
    assert "not in the range x>=1024" in refused.output


def test_read_values_refuses_long_values() -> None:
    data = b'{\n"a": 1\n}\n{"a": "' + b"x" * 100
    with pytest.raises(SourceUnreadableError, match=r"element 2 is longer"):
        list(read_values(iter([data]), "a", 50))


def test_read_records_bounds_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = record("one") + record(LONG) + record("three")
    (tmp_path / "a.jsonl").write_text(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    for source in (str(tmp_path / "a.jsonl"), "-"):
        found = list(read_records(source, LIMIT))
        assert [isinstance(one, BadRecordError) for one in found] == [False, True, False]
