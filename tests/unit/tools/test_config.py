"""`megaback config`: configs with their defaults, and explained keys."""

import json
from pathlib import Path

import yaml
from click.testing import CliRunner

from tests.helpers.paths import ROOT
from tools.config import main

DEMO = str(ROOT / "configs" / "demo.yaml")


def printed(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_key_is_explained_with_its_section() -> None:
    text = printed("--explain", "zero.stage", "run")
    assert text.startswith("zero  Sharding and offload")
    assert "zero.stage\n    0, 1, 2, 3; default 2\n    Stage of ZeRO" in text
    assert "run\n    path; required\n    Folder of the run" in text
    assert "zero.offload" not in text

    facts = json.loads(printed("--explain", "guard", "--json"))
    assert facts["guard.spike_nats"]["values"] == ["number", "x>0"]
    assert not facts["guard.spike_nats"]["required"]


def test_a_config_is_shown_with_defaults_and_without_secrets(tmp_path: Path) -> None:
    url = "data.shards=https://user:word@example.org/shards"
    shown = yaml.safe_load(printed(DEMO, "zero.stage=1", url))
    assert shown["zero"] == {**shown["zero"], "stage": 1, "offload": "none"}
    assert shown["model"]["mlp_width"] == 384
    assert "word@" not in shown["data"]["shards"]
    assert json.loads(printed(DEMO, "zero.stage=1", url, "--json")) == shown
    result = CliRunner().invoke(main, [])
    assert (result.exit_code, "Give a CONFIG" in result.output) == (2, True)
