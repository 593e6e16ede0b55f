"""Models of the hub: named files at one commit, by address, and again without a network."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from data_pipeline.errors import SourceMissingError, SourceUnreadableError
from data_pipeline.storage.hub_models import fetch_model, is_remote_model
from tests.helpers.hub_server import COMMIT, ModelHub, serving_model, using_hub

NAMES = ("config.json", "model-*-of-*.safetensors", "absent.json")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (folder / name).write_text(name)
    with serving_model(folder) as hub:
        using_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.mark.parametrize(
    "address",
    [
        *("hf://org/model", "hf:org/model", "hf://org/model@main", f"hf://org/model@{COMMIT}"),
        *("https://huggingface.co/org/model", "https://huggingface.co/org/model/tree/main"),
    ],
)
def test_only_named_files_are_fetched_and_the_commit_is_known(address: str, hub: ModelHub) -> None:
    assert is_remote_model(address)

    found = fetch_model(address, NAMES)

    assert found.address == f"hf://org/model@{COMMIT}"
    assert sorted(hub.asked) == ["config.json", "model-00001-of-00002.safetensors"]
    assert {path.name for path in found.folder.iterdir()} == set(hub.asked)
    assert (found.folder / "config.json").read_text() == "config.json"


def test_fetched_files_are_used_without_a_network(
    hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch_model("hf://org/model", NAMES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert fetch_model("hf://org/model", NAMES) == first
    with pytest.raises(SourceMissingError, match="not in the hub's cache"):
        fetch_model("hf://org/model@other", NAMES)
    assert len(hub.asked) == 2


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("hf://org/other", "no such model on the hub"),
        ("hf://org/model@other", "it has no revision other"),
        ("hf://model", "write hf://OWNER/NAME"),
        ("hf://datasets/org/model", "write hf://OWNER/NAME"),
        ("https://example.org/models/model", "write hf://OWNER/NAME"),
        ("s3://user:secret@bucket/model", "write hf://OWNER/NAME"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_other_addresses_are_refused_with_the_form_to_use(address: str, reason: str) -> None:
    with pytest.raises(SourceMissingError, match=reason) as refused:
        fetch_model(address, NAMES)
    assert "secret" not in str(refused.value)


def test_a_token_is_sent_and_never_shown(hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    hub.has_failed = True

    with pytest.raises((SourceMissingError, SourceUnreadableError)) as refused:
        fetch_model("hf://org/model", NAMES)

    assert hub.tokens == {"Bearer hf_planted"}
    assert "planted" not in str(refused.value)
