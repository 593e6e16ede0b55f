"""The training command that is named for a data set fits its vocabulary."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.build.train_command import train_commands
from data_pipeline.shards.manifest import Manifest
from megaback.cli import main as megaback
from megaback.config_file import load_config


def test_shards_of_a_large_vocabulary_name_a_new_config_that_can_be_written(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.chdir(folder)
    manifest = Manifest.load(copy)
    (small,) = train_commands(copy, manifest)
    assert small.startswith("megaback train ")
    large = replace(manifest, vocab_size=50_265)

    for name in (f"{copy.name}.yaml", f"{copy.name}-2.yaml"):
        (line,) = train_commands(copy, large)
        words = shlex.split(line)[1:]
        assert (words[0], words[-1]) == ("new", name)
        # So that this machine's speed is not measured.
        result = CliRunner().invoke(megaback, [*words, "--device-flops", "1e10"])
        assert result.exit_code == 0, result.output
        assert load_config(Path(name), ()).data.shards[0].path == str(copy)
