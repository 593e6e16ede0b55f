"""Untrusted model folders and checkpoints: read or refused, in bounded time and memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointCorruptError, MegabackError, NonFiniteError
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.checkpoint import find_checkpoint, read_meta
from megaback.config import ModelSection
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from megaback.run_folder import META_NAME
from megaback.weights.base_shape import base_shape
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder, read_description
from megaback.weights.source import open_checkpoint, open_source
from megaback.weights.weight_names import shapes_of
from tests.helpers.decoding import chosen
from tests.helpers.exports import write_checkpoint
from tests.helpers.hostile_files import bounded
from tools.convert import convert

CPU = torch.device("cpu")
Codecs = Callable[..., TextCodec]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NUMBERS = (0, -1, True, 1.5, "7", [1], {}, None, 1 << 31, 1 << 40, 1 << 63, float("nan"))
_OURS = ("vocab_size", "context_tokens", "step")
_SHAPE = ("num_layers", "width", "num_heads", "num_kv_heads", "mlp_width")
_STOCK = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_parameters", "model_type", "auto_map"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Path:
    """A run, and the models `full`, `hf` and `foreign` of its checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "run", codec())
    for kind in ("full", "hf"):
        convert(folder / "run", folder / kind, kind, "float32")
    convert(folder / "run", folder / "foreign", "hf", "float32")
    (folder / "foreign" / "megaback.spm").rename(folder / "foreign" / "tokenizer.model")
    change_json(folder / "foreign" / "config.json", lambda fields: fields.pop("megaback"))
    return folder


def copied(source: Path, target: Path) -> Path:
    """Hard links to the files of a model, except for a writable copy of config.json."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        os.link(path, target / path.name)
    unlinked(target / "config.json")
    return target


def unlinked(path: Path) -> Path:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def readers(folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: base_shape(folder),
        lambda: open_source(folder),
        lambda: load_model_folder(folder, CPU),
    ]


def refused_or_read(folder: Path) -> list[MegabackError]:
    """Errors of all readers of a folder; only a MegabackError is allowed."""
    found = []
    for read in readers(folder):
        try:
            with bounded():
                read()
        except MegabackError as error:
            found.append(error)
    assert all(len(str(error)) < 2000 for error in found)
    return found


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, None])
def test_shapes_derived_from_a_config_equal_the_models(
    kv_heads: int | None, qk_norm: bool, tie_embeddings: bool
) -> None:
    shape = ModelSection(
        num_layers=3,
        width=24,
        num_heads=4,
        num_kv_heads=kv_heads,
        qk_norm=qk_norm,
        tie_embeddings=tie_embeddings,
    )
    parameters = ReverseGPT(shape, 50).named_parameters()
    expected = {name: tuple(weight.shape) for name, weight in parameters}
    assert list(shapes_of(shape, 50).items()) == list(expected.items())


@pytest.mark.parametrize("kind", ["full", "hf"])
@pytest.mark.parametrize("name", [*_OURS, *_SHAPE])
def test_invalid_numbers_in_our_config_are_refused(
    name: str, kind: str, made: Path, tmp_path: Path
) -> None:
    for number, value in enumerate(_NUMBERS):
        folder = copied(made / kind, tmp_path / str(number))

        def change(fields: Any, value: object = value) -> None:
            ours = fields["megaback"] if kind == "hf" else fields
            (ours if name in _OURS else ours["model"])[name] = value

        change_json(folder / "config.json", change)
        is_default = name in ("num_kv_heads", "mlp_width") and value is None
        is_step = name == "step" and value in (0, 1 << 31, 1 << 40) and value is not True
        problems = refused_or_read(folder)
        assert is_default or is_step or len(problems) >= 2, value


@pytest.mark.parametrize("name", _STOCK)
def test_fields_of_another_librarys_config_are_refused_or_read(
    name: str, made: Path, tmp_path: Path
) -> None:
    for number, value in enumerate((*_NUMBERS, "x" * 100, [0] * 5, {"a": [1]})):
        folder = copied(made / "foreign", tmp_path / str(number))
        change_json(
            folder / "config.json", lambda fields, value=value: fields.update({name: value})
        )
        refused_or_read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4096}, "model.layers.10.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 30_000}, "num_layers"),
        ({"intermediate_size": 1 << 30}, r"has shape \[128, 32\], not \[1073741824, 32\]"),
        ({"vocab_size": 1 << 21}, r"has shape \[600, 32\], not \[2097152, 32\]"),
        ({"head_dim": [0], "num_attention_heads": 1 << 30}, "head_dim is"),
        ({"head_dim": "x", "num_attention_heads": 1 << 40}, "head_dim is"),
    ],
)
def test_absurd_sizes_are_compared_with_the_headers(
    change: dict[str, Any], message: str, made: Path, tmp_path: Path
) -> None:
    folder = copied(made / "foreign", tmp_path / "model")
    change_json(folder / "config.json", lambda fields: fields.update(change))
    with bounded(), pytest.raises(MegabackError, match=message):
        open_source(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "7", "{", "", "{}" + " " * (5 << 20)])
def test_an_invalid_config_json_is_refused(content: str, made: Path, tmp_path: Path) -> None:
    folder = copied(made / "full", tmp_path / "model")
    (folder / "config.json").write_text(content)
    assert len(refused_or_read(folder)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(value: float, made: Path, tmp_path: Path) -> None:
    folder = copied(made / "full", tmp_path / "model")
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = value
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        CheckpointCorruptError, match=r"model\.norm\.weight in .* non-finite values"
    ):
        load_model_folder(folder, CPU)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 3])
def test_non_finite_logits_are_an_error(temperature: float, top_k: int) -> None:
    """Finite weights can produce them too."""
    options = SamplingOptions(temperature=temperature, top_k=top_k)
    logits_BV, draws = torch.zeros(2, 9), [np.random.default_rng(seed) for seed in (1, 2)]
    assert len(chosen(logits_BV, options, draws)) == 2
    logits_BV[1, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="logits are non-finite"):
        chosen(logits_BV, options, draws)


def test_a_context_that_exceeds_the_memory_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megaback.weights.model_folder.host_memory_bytes", lambda: 1 << 31)
    folder = copied(made / "full", tmp_path / "model")
    change_json(folder / "config.json", lambda fields: fields.update(context_tokens=1 << 24))
    (problem,) = refused_or_read(folder)
    assert "a context of 16,777,216 tokens, but this machine has 2.1 GB" in str(problem)


# Names.


@pytest.fixture
def in_parts(made: Path, tmp_path: Path) -> Path:
    """A model in several files, with another file next to its folder."""
    folder = tmp_path / "parts" / "model"
    convert(made / "run", folder, "full", "float32", max_file_bytes=30_000)
    (folder.parent / "secret.safetensors").write_bytes((made / "full" / WEIGHTS).read_bytes())
    return folder


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", ".", "..", "", "a/b.safetensors", "a\0", "x", 7, None],
)
def test_an_index_with_files_outside_its_folder_is_refused(name: object, in_parts: Path) -> None:
    def change(fields: Any) -> None:
        fields["weight_map"] = dict.fromkeys(fields["weight_map"], name)

    change_json(in_parts / INDEX, change)
    problems = refused_or_read(in_parts)[-2:]
    assert [INDEX in str(problem) for problem in problems] == [True, True]


@pytest.mark.parametrize("files", [{}, [], None, {"a": []}, {"a": {}}, [1]])
def test_an_index_without_files_is_refused(files: object, in_parts: Path) -> None:
    change_json(in_parts / INDEX, lambda fields: fields.update(weight_map=files))
    problems = refused_or_read(in_parts)[-2:]
    assert [INDEX in str(problem) for problem in problems] == [True, True]


def test_a_link_out_of_the_folder_is_not_followed_for_a_file_in_an_index(in_parts: Path) -> None:
    first = sorted(in_parts.glob("model-*.safetensors"))[0]
    first.rename(in_parts.parent / "elsewhere")
    first.symlink_to("../elsewhere")
    problems = refused_or_read(in_parts)[-2:]
    assert ["link out of its folder" in str(problem) for problem in problems] == [True, True]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.model", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_a_pipe_or_device_instead_of_a_file_is_refused(
    kind: str, name: str, made: Path, tmp_path: Path
) -> None:
    folder = copied(made / "full", tmp_path / "model")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to(kind)
    with bounded(), pytest.raises(MegabackError):
        load_model_folder(folder, CPU)


# Checkpoints.


def checkpoint_of(made: Path, tmp_path: Path) -> Path:
    (target,) = (made / "run" / "checkpoints").iterdir()
    folder = tmp_path / "run" / "checkpoints" / target.name
    folder.mkdir(parents=True)
    for path in target.iterdir():
        os.link(path, folder / path.name)
    unlinked(folder / META_NAME)
    return folder


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/passwd", "..", "", "notes.txt", "weights-1.safetensors"]
)
def test_a_checkpoint_that_lists_other_files_is_refused(
    name: str, made: Path, tmp_path: Path
) -> None:
    target = checkpoint_of(made, tmp_path)
    change_json(target / META_NAME, lambda fields: fields["files"].update({name: [1, "0" * 64]}))
    with pytest.raises(CheckpointCorruptError, match="not a plain file name"):
        find_checkpoint(target)


def test_a_link_out_of_a_checkpoint_is_not_followed(made: Path, tmp_path: Path) -> None:
    target = checkpoint_of(made, tmp_path)
    (target / "tokenizer.model").rename(tmp_path / "elsewhere")
    (target / "tokenizer.model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorruptError, match="link out of its folder"):
        open_checkpoint(target)


def test_a_checkpoint_with_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    target = checkpoint_of(made, tmp_path)
    path = unlinked(target / "tokenizer.model")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointCorruptError, match=r"tokenizer\.model is not the file that was"):
        open_checkpoint(target)


@pytest.mark.parametrize("mark", ["best", "latest"])
@pytest.mark.parametrize("name", ["../../other/checkpoints/step-00000030", "/", "", "x" * 5000])
def test_a_mark_that_names_no_checkpoint_of_its_folder_is_refused(
    name: str, mark: str, made: Path, tmp_path: Path
) -> None:
    path = checkpoint_of(made, tmp_path).parent / mark
    path.write_text(name)
    for read in (find_checkpoint, base_shape, model_folder):
        with pytest.raises(
            CheckpointCorruptError, match="does not name a checkpoint in its folder"
        ):
            read(path)  # type: ignore[operator]


_META_FIELDS = (
    *("step", "updates", "world_size", "zero_stage", "precision", "vocab_size", "text_format"),
    *("data_fingerprint", "config", "val_loss", "versions", "files", "on_examples"),
    "order_version",
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(_META_FIELDS), _VALUES, min_size=1, max_size=3))
def test_metadata_with_any_values_is_refused_or_read(
    changes: dict[str, Any], made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = checkpoint_of(made, tmp_path_factory.mktemp("mutated"))
    change_json(target / META_NAME, lambda fields: fields.update(changes))
    try:
        open_checkpoint(target)
    except MegabackError:
        return
    read_meta(target)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_config_json_with_any_value_is_refused_or_read(
    data: st.DataObject, made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from(["full", "hf", "foreign"]))
    folder = copied(made / kind, tmp_path_factory.mktemp("mutated") / "model")

    def change(fields: Any) -> None:
        places = [fields, *(one for one in fields.values() if isinstance(one, dict))]
        place = places[data.draw(st.integers(0, len(places) - 1))]
        place[data.draw(st.sampled_from(sorted(place) or ["x"]))] = data.draw(_VALUES)

    change_json(folder / "config.json", change)
    try:
        read_description(folder)
        open_source(folder)
    except MegabackError:
        return
