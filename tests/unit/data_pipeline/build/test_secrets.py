"""Builds from addresses with secrets: none is written, and a new signature is the same source."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline import redaction
from data_pipeline.build.command import build_planned, build_shards
from data_pipeline.build.finalize import finalize_build
from data_pipeline.build.plan import PLAN_NAME, Plan
from data_pipeline.build.plan_command import claim_plan
from data_pipeline.build.task import run_task
from data_pipeline.errors import ConfigError, OutputExistsError
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.shards.recompress import recompress
from data_pipeline.sources.weighted import WeightedSource
from tests.helpers.builds import Codecs, hashes, make_settings
from tests.helpers.file_server import FileServer

PLANT = "S3CR3T-plant"

pytestmark = pytest.mark.usefixtures("in_threads", "a_task_a_file")


@pytest.fixture
def served(server: FileServer, source: Path) -> str:
    """The address of two files, without their number, login and signature."""
    for number in range(2):
        server.files[f"{number}.jsonl"] = (source / f"{number}.jsonl").read_bytes()
    return server.url("{}.jsonl")


def signed(served: str, signature: str) -> list[str]:
    return [
        served.format(number).replace("://", f"://user:{signature}@")
        + f"?id={number}&sig={signature}"
        for number in range(2)
    ]


def sources_of(addresses: list[str]) -> tuple[WeightedSource, ...]:
    return tuple(map(WeightedSource, addresses))


def forget_variables() -> None:
    """As in another process."""
    redaction._known.clear()
    for name in list(os.environ):
        if name.startswith(redaction.VARIABLE_PREFIX):
            del os.environ[name]


def assert_clean(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or PLANT.encode() not in path.read_bytes(), path


def test_a_build_writes_no_secret_and_resumes_with_another_signature(
    served: str, codec: Codecs, tmp_path: Path
) -> None:
    settings = make_settings("", codec(), sources=sources_of(signed(served, f"{PLANT}-1")))
    plan, _ = claim_plan(settings, codec(), tmp_path / "out", None)
    run_task(plan.tasks[0], tmp_path / "out", codec().model_bytes)
    assert_clean(tmp_path / "out")
    forget_variables()
    again = make_settings("", codec(), sources=sources_of(signed(served, f"{PLANT}-2")))
    manifest, num_found = build_shards(again, codec(), tmp_path / "out", 1)
    assert num_found == 1
    assert_clean(tmp_path / "out")
    shown = [f"{served.format(number)}?id={number}" for number in range(2)]
    assert manifest.source == ", ".join(shown)
    forget_variables()
    third = make_settings("", codec(), sources=sources_of(signed(served, f"{PLANT}-3")))
    before = hashes(tmp_path / "out")
    assert build_shards(third, codec(), tmp_path / "out", 1)[1] == 2
    assert hashes(tmp_path / "out") == before


def test_sources_that_differ_in_harmless_values_are_not_the_same(
    served: str, codec: Codecs, tmp_path: Path
) -> None:
    one, other = (
        make_settings("", codec(), sources=sources_of([f"{served.format(0)}?id={x}&sig={PLANT}"]))
        for x in (1, 2)
    )
    claim_plan(one, codec(), tmp_path / "out", None)
    with pytest.raises(OutputExistsError, match=r"shards of http\S+\?id=1, not of http\S+\?id=2;"):
        claim_plan(other, codec(), tmp_path / "out", None)


def test_a_plan_alone_needs_the_variables_that_its_addresses_name(
    served: str, codec: Codecs, tmp_path: Path
) -> None:
    addresses = [
        f"{address.partition('?')[0]}?${{MEGABACK_SECRET_SAS}}" for address in signed(served, PLANT)
    ]
    os.environ["MEGABACK_SECRET_SAS"] = f"sig={PLANT}"
    settings = make_settings("", codec(), sources=sources_of(addresses))
    claim_plan(settings, codec(), tmp_path / "out", None)
    held = {name: value for name, value in os.environ.items() if PLANT in value}
    forget_variables()
    with pytest.raises(ConfigError, match="MEGABACK_SECRET_"):
        build_planned(Plan.load(tmp_path / "out"), codec(), tmp_path / "out", 1)
    os.environ.update(held)
    build_planned(Plan.load(tmp_path / "out"), codec(), tmp_path / "out", 1)
    assert_clean(tmp_path / "out")


def make_old(folder: Path, name: str) -> None:
    """Write secrets into a file, as earlier versions did."""
    path = folder / name
    text = path.read_text()
    for variable in [name for name in os.environ if name.startswith(redaction.VARIABLE_PREFIX)]:
        text = text.replace(f"${{{variable}}}", os.environ[variable])
    if name == MANIFEST_NAME:
        fields = json.loads(text)
        fields["source"] = fields["source"].replace("?", f"?sig={PLANT}&")
        text = json.dumps(fields, indent=2) + "\n"
    assert PLANT in text
    path.write_text(text)


@pytest.mark.parametrize("has_source", [True, False])
def test_a_plan_of_an_earlier_version_resumes_and_its_secrets_are_removed(
    served: str, codec: Codecs, tmp_path: Path, has_source: bool
) -> None:
    out = tmp_path / "out"
    settings = make_settings("", codec(), sources=sources_of(signed(served, PLANT)))
    claim_plan(settings, codec(), out, None)
    make_old(out, PLAN_NAME)
    forget_variables()
    if has_source:
        again = make_settings("", codec(), sources=sources_of(signed(served, PLANT)))
        build_shards(again, codec(), out, 1)
    else:
        build_planned(Plan.load(out), codec(), out, 1)
    assert_clean(out)
    assert finalize_build(Plan.load(out), codec(), out, 1) == Manifest.load(out)


def test_a_manifest_of_an_earlier_version_is_read_without_its_secrets(
    served: str, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    settings = make_settings("", codec(), sources=sources_of(signed(served, PLANT)))
    build_shards(settings, codec(), out, 1)
    make_old(out, MANIFEST_NAME)
    assert PLANT not in Manifest.load(out).source
    recompress(out, tmp_path / "smaller", Compression(level=1))
    assert_clean(tmp_path / "smaller")


def test_an_untrusted_plan_sends_no_variable_to_its_server(
    served: str, server: FileServer, codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANT)
    WeightedSource(f"https://elsewhere.example/x?sig={PLANT}-typed")
    names = [name for name in os.environ if name.startswith(redaction.VARIABLE_PREFIX)]
    claim_plan(make_settings(served.format(0), codec()), codec(), out, None)
    text = (out / PLAN_NAME).read_text()
    for name in ("AWS_SECRET_ACCESS_KEY", *names):
        stolen = json.dumps(f"{served.format(0)}?x=${{{name}}}")
        (out / PLAN_NAME).write_text(text.replace(json.dumps(served.format(0)), stolen))
        with pytest.raises((ConfigError, OutputExistsError)):
            build_planned(Plan.load(out), codec(), out, 1)
    assert PLANT not in "".join(server.targets)
