"""Names read from files lead to nothing outside their folder."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.file_names import path_within, plain_name
from data_pipeline.shards.manifest import SHARD_NAME

HOSTILE = [
    *("", ".", "..", "../x", "a/../../x", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:x"),
    *("a\0b", "a\nb", "\x1b[2J", "a" * 256, "é" * 128, None, 7, ["x"], {"a": 1}),
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:20])
def test_hostile_names_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a plain file name"):
        path_within(tmp_path, name)


@given(name=st.one_of(st.text(max_size=300), st.text("./\\~a", max_size=12)))
def test_an_accepted_name_is_a_file_directly_in_its_folder(name: str) -> None:
    folder = Path("/data/set")
    try:
        path = folder / plain_name(name)
    except ValueError:
        return
    assert path.parent == folder
    assert os.path.normpath(path) == str(path) == f"/data/set/{name}"


def test_a_form_must_match_the_whole_name() -> None:
    assert plain_name("train-00000-00000.zst", SHARD_NAME) == "train-00000-00000.zst"
    for name in ("train-00000-00000.zst.py", "xtrain-00000-00000.zst", ".bashrc"):
        with pytest.raises(ValueError, match=re.escape(name)):
            plain_name(name, SHARD_NAME)


def test_links_out_of_the_folder_are_refused_and_others_followed(tmp_path: Path) -> None:
    outside = tmp_path / "private"
    outside.write_text("secret")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "real").write_text("x")
    (folder / "inner").symlink_to("real")
    (folder / "outer").symlink_to(outside)
    (folder / "dangling").symlink_to("../nowhere")
    assert path_within(folder, "inner").read_text() == "x"
    assert path_within(folder, "missing") == folder / "missing"
    for name in ("outer", "dangling"):
        with pytest.raises(ValueError, match="is a symbolic link out of its folder"):
            path_within(folder, name)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)  # the user's own link to a whole folder
    assert path_within(linked, "inner").read_text() == "x"


def test_links_of_a_hub_snapshot_to_its_blobs_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--model"
    blob = repository / "blobs" / "abc"
    snapshot = repository / "snapshots" / "0123"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    blob.write_text("weights")
    (tmp_path / "private").write_text("secret")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (snapshot / "tokenizer.model").symlink_to("../../../private")
    assert path_within(snapshot, "model.safetensors").read_text() == "weights"
    with pytest.raises(ValueError, match="link out of its folder"):
        path_within(snapshot, "tokenizer.model")
