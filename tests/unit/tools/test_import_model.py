"""`megaback import model`: its output, and what it leaves behind when it is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from click.testing import CliRunner, Result

from data_pipeline.errors import OutputExistsError, RunMismatchError
from data_pipeline.text.codec import TextCodec
from megaback.origins import Import, WeightsIdentity
from megaback.run_folder import META_NAME
from megaback.weights.model_folder import read_description
from tests.helpers.exports import write_checkpoint
from tools.convert import convert
from tools.import_model import main as import_command
from tools.inspect_path import main as inspect_command

Codecs = Callable[..., TextCodec]


def imported(*words: object) -> Result:
    return CliRunner().invoke(import_command, [str(word) for word in words])


def make_theirs(folder: Path, codec: TextCodec, **fields: object) -> Path:
    write_checkpoint(folder / "run", codec, head_dim=16)
    theirs = folder / "theirs"
    convert(folder / "run", theirs, "hf", "float32")
    (theirs / "megaback.spm").rename(theirs / "tokenizer.model")
    (theirs / "tokenizer.json").unlink()
    config = json.loads((theirs / "config.json").read_text())
    del config["megaback"]
    (theirs / "config.json").write_text(json.dumps({**config, **fields}))
    return theirs


def test_the_model_and_its_origin_are_shown_and_stay_in_exports(
    tmp_path: Path, codec: Codecs
) -> None:
    theirs, out = make_theirs(tmp_path, codec()), tmp_path / "ours"

    result = imported(theirs, "--direction", "backward", "--context-tokens", 32, "--out", out)

    assert result.exit_code == 0, result.output
    assert f"{theirs} (transformers): Qwen3 with 2 layers, width 32, 4 heads of 16" in result.output
    assert f"next: megaback inspect {out}" in result.output
    shown = CliRunner().invoke(inspect_command, [str(out), "--verify"])
    assert re.search(rf"imported_from +{theirs} \(transformers\)", shown.output)
    for kind in ("hf", "gguf"):
        convert(out, tmp_path / kind, kind, "float32")
        card = (tmp_path / kind / "README.md").read_text()
        assert "come from a model of another program (transformers), imported as backward" in card
        assert f"`{theirs}`" in card


def test_a_run_that_began_with_an_imported_model_names_it_in_its_exports(
    tmp_path: Path, codec: Codecs
) -> None:
    """Without the base, from the run's own checkpoint, through a full model and a mean of two."""
    origin = Import(
        base=WeightsIdentity(path="theirs/Qwen3", sha256="1" * 64),
        kind="transformers",
        added_rows=3,
    )
    target, _ = write_checkpoint(tmp_path / "run", codec(), init_from="models/gone")
    meta = json.loads((target / META_NAME).read_text())
    (target / META_NAME).write_text(json.dumps({**meta, "imported": asdict(origin)}))

    convert(tmp_path / "run", tmp_path / "full", "full", "float32")
    for kind in ("hf", "gguf"):
        convert(tmp_path / "full", tmp_path / kind, kind, "float32")
        card = (tmp_path / kind / "README.md").read_text()
        assert "Training began with the weights of a model of another program" in card
        assert "- `theirs/Qwen3`, SHA-256 `1111" in card
        assert "each the mean of the others: 3" in card
    assert read_description(tmp_path / "hf").imported == origin
    shown = CliRunner().invoke(inspect_command, [str(tmp_path / "run")])
    assert re.search(r"imported_from +theirs/Qwen3 \(transformers\)", shown.output)


def test_a_refused_model_leaves_nothing_behind(tmp_path: Path, codec: Codecs) -> None:
    theirs = make_theirs(tmp_path, codec(), mlp_bias=True)
    out = tmp_path / "ours"

    result = imported(theirs, "--direction", "forward", "--out", out)

    assert result.exit_code == RunMismatchError.exit_code
    assert "mlp_bias = True" in result.output
    assert not out.exists()
    result = imported(theirs, "--direction", "forward", "--out", theirs)
    assert result.exit_code == OutputExistsError.exit_code
