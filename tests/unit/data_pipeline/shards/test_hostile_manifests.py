"""Hostile manifests, plans and other small files: one error, at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_pipeline.build.options import echo_manifest
from data_pipeline.build.plan import Plan
from data_pipeline.errors import MegabackError, ShardCorruptError, TokenizerError
from data_pipeline.shards import inspection
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import DICTIONARY_NAME, MANIFEST_NAME, Manifest
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from tests.helpers.data_sets import publish
from tests.helpers.file_server import FileServer
from tests.helpers.size_bounds import change_shard, refused, within_bounds

MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"{key} {value!r:.20}": lambda fields, key=key, value=value: fields.update({key: value})
        for key, values in {
            "frame_tokens": [1 << 25, 0, -1, True, "256", 2.5, None, [256], 10**4000],
            "vocab_size": [0, -600, 70_000, 1 << 33, True, "600"],
            "id_bytes": [0, 1, 3, 8, -2, True, "2"],
            "begin_id": [-1, 1 << 40, "1"],
            "end_id": [600_000, None],
            "val_fraction": [1.5, -0.1, "0.1", True, None],
            "requested_val_fraction": ["0.1", 7],
            "source": [7, None, ["a"]],
            "excluded": [[], {"empty": -1}, {"empty": "1"}, {"empty": 10**30}, 7],
            "skipped": [
                [],
                {"files": {"a": {"count": 1, "first": []}}},
                {"files": []},
                {"files": {"a": {"count": "1", "first": []}}},
                7,
            ],
            "dictionary_sha256": ["../../x", 7, "A" * 64],
            "tokenizer_sha256": ["5", None, "../" * 30],
            "direction": ["sideways", 7, None, "x" * 10_000_000],
            "unit": [["token"]],
            "fingerprint": [7, "0" * 64],
            "version": [1, 4, 5, "3", [3], None],
            "format": ["megaback", {}],
            "shards": [{}, 7, "train", [7], [[]], [{}], [None]],
        }.items()
        for value in values
    },
    **{
        f"shard's {key} {value!r:.20}": lambda fields, key=key, value=value: fields["shards"][
            0
        ].update({key: value})
        for key, values in {
            "tokens": [0, -1, 1 << 41, True, "1", 1.0, None, 10**4000],
            "documents": [0, -5, 1 << 60, "1"],
            "text_bytes": [-1, 1 << 63, "1"],
            "file_bytes": [-1, 0, 1 << 63, 10**40],
            "file_sha256": ["../../../../../etc", 7, "", "g" * 64],
            "content_sha256": [None, "0" * 63],
            "loss_tokens": [1 << 40, -1],
            "padding_tokens": [-1, "0"],
            "another": [1],
        }.items()
        for value in values
    },
    **{
        f"no {key}": lambda fields, key=key: fields.pop(key)
        for key in ("shards", "format", "vocab_size", "excluded", "fingerprint")
    },
    "no file": lambda fields: fields["shards"][0].pop("file"),
}


@pytest.mark.parametrize("hostile", MANIFESTS)
def test_a_manifest_with_impossible_fields_is_one_error(copy: Path, hostile: str) -> None:
    fields = json.loads((copy / MANIFEST_NAME).read_text())
    MANIFESTS[hostile](fields)
    (copy / MANIFEST_NAME).write_text(json.dumps(fields))
    with within_bounds(), pytest.raises(ShardCorruptError) as caught:
        Manifest.load(copy)
    assert "is not a manifest of this version (" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(copy))


@pytest.mark.parametrize("version", [1, 2])
def test_a_manifest_of_an_earlier_version_is_named_as_such(copy: Path, version: int) -> None:
    fields = json.loads((copy / MANIFEST_NAME).read_text())
    fields["left_out"] = fields.pop("excluded")
    (copy / MANIFEST_NAME).write_text(json.dumps({**fields, "version": version}))

    with pytest.raises(ShardCorruptError, match=r"an earlier version.*build the shards"):
        Manifest.load(copy)


MANIFEST_TEXTS = {
    "nothing": b"",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"7",
    "a string": b'"manifest"',
    "null": b"null",
    "nesting": b"[" * 3_000_000,
    "objects": b'{"a":' * 1_000_000,
    "digits": b'{"version": ' + b"9" * 3_000_000 + b"}",
    "lists": b"[" + b"[]," * 10_000_000 + b"[]]",
    "shards": b'{"shards": [' + b"{}," * 10_000_000 + b"{}]}",
    "infinity": b'{"version": Infinity}',
    "half": b'{"format": "megaback-sh',
}


@pytest.mark.parametrize("text", MANIFEST_TEXTS)
def test_a_malformed_manifest_is_refused_at_once(copy: Path, text: str) -> None:
    (copy / MANIFEST_NAME).write_bytes(MANIFEST_TEXTS[text])
    refused(copy)


@pytest.mark.parametrize(
    ("name", "code"), [(MANIFEST_NAME, 31), (TOKENIZER_NAME, 24), (DICTIONARY_NAME, 31)]
)
def test_a_file_of_a_terabyte_is_not_read(copy: Path, name: str, code: int) -> None:
    if name == DICTIONARY_NAME:
        fields = json.loads((copy / MANIFEST_NAME).read_text())
        fields["dictionary_sha256"] = "5" * 64
        (copy / MANIFEST_NAME).write_text(json.dumps(fields))
    with (copy / name).open("ab") as file:
        file.truncate(1 << 40)
    for folder in (copy, f"file://{copy}"):
        with within_bounds(), pytest.raises(MegabackError, match="more than") as caught:
            open_all(folder)
        assert caught.value.exit_code == code


def open_all(folder: Path | str) -> None:
    data_set = DataSet.open(folder)
    data_set.open_shard(data_set.manifest.shards[0])
    data_set.codec()


def test_a_tokenizer_of_too_many_pieces_is_refused() -> None:
    from sentencepiece import sentencepiece_model_pb2

    from data_pipeline.text.codec import Direction, TextCodec, Unit

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    for number in range(50):
        model.pieces.add(piece=f"p{number}", score=0.0, type=2 if number == 0 else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.text.tokenizer.MAX_VOCABULARY", 49)
        with pytest.raises(TokenizerError, match="50 pieces, more than the 49"):
            TextCodec(model.SerializeToString(), Direction.BACKWARD, Unit.TOKEN)


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "portions": lambda plan: plan.update(task_portions=[1 << 62]),
    "negative portions": lambda plan: plan.update(
        task_portions=[-1, sum(plan["task_portions"]) + 1]
    ),
    "a weight": lambda plan: plan["settings"]["sources"][0].update(weight=1e308),
    "a weight of a thousand": lambda plan: (
        plan["settings"]["sources"][0].update(weight=1000.0),
        plan.update(
            inputs=[[{**plan["inputs"][0][0], "slices": [[0, 1, 1]] * 20_000}]],
            task_portions=[20_000_000],
        ),
    ),
    "a shard's size": lambda plan: plan["settings"].update(shard_tokens="7"),
    "a level": lambda plan: plan["settings"].update(compression_level=99),
    "a frame": lambda plan: plan["settings"].update(frame_tokens=1 << 30),
    "a column": lambda plan: plan["settings"].update(text_column=["text"]),
    "a direction": lambda plan: plan["settings"].update(direction="sideways"),
    "a split": lambda plan: plan["settings"]["sources"][0].update(split="../x"),
    "a slice": lambda plan: plan["inputs"][0][0].update(slices=[[0, 1]]),
    "a slice's number": lambda plan: plan["inputs"][0][0].update(slices=[[0, 1, "7"]]),
    "a path": lambda plan: plan["inputs"][0][0].update(path=7),
    "inputs": lambda plan: plan.update(inputs=7),
    "more inputs": lambda plan: plan.update(inputs=plan["inputs"] * 2),
    "tasks": lambda plan: plan.update(requested_tasks="7"),
    "a number of tasks": lambda plan: plan.update(requested_tasks=1 << 53),
    "causes": lambda plan: plan.update(skipped=[7]),
    "a version": lambda plan: plan.update(version=[1] * 1000),
}


@pytest.mark.parametrize("hostile", PLANS)
def test_a_plan_with_impossible_fields_is_one_error(copy: Path, hostile: str) -> None:
    fields = json.loads((copy / "plan.json").read_text())
    PLANS[hostile](fields)
    (copy / "plan.json").write_text(json.dumps(fields))
    with within_bounds(), pytest.raises(MegabackError) as caught:
        Plan.load(copy)
    assert caught.value.exit_code == 44
    assert len(str(caught.value)) < 600 + len(str(copy))


@pytest.mark.parametrize("text", MANIFEST_TEXTS)
def test_a_malformed_plan_is_refused_at_once(copy: Path, text: str) -> None:
    (copy / "plan.json").write_bytes(MANIFEST_TEXTS[text])
    with within_bounds(), pytest.raises(MegabackError):
        Plan.load(copy)


def test_the_files_of_a_build_are_accepted(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counterpart of the refusals above."""
    change_shard(copy, lambda _: None)
    assert CliRunner().invoke(inspection.main, [str(copy)]).exit_code == 0
    echo_manifest(Manifest.load(copy), copy)
    assert Plan.load(copy).num_tasks
    assert "documents" in capsys.readouterr().out


def test_a_manifest_over_the_size_limit_from_a_server_is_refused(
    copy: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(server, copy)
    DataSet.open(url)
    monkeypatch.setattr("data_pipeline.shards.manifest.MAX_MANIFEST_BYTES", 1000)
    server.requests.clear()
    with pytest.raises(ShardCorruptError, match="it has more than 1,000 bytes"):
        DataSet.open(url)
    assert len(server.requests) == 1
