"""Models of other programs: what is imported unchanged, and what is refused by name."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    MegabackError,
    RunMismatchError,
    TokenizerError,
)
from data_pipeline.storage.hub_models import fetch_model
from data_pipeline.text.codec import Directions, TextCodec
from megaback.weights.identity import identity_of
from megaback.weights.imported import DESCRIPTION_FILES, ImportedModel, open_import
from megaback.weights.model_folder import (
    load_model_folder,
    read_description,
    write_model_folder,
)
from tests.helpers.bpe import NUM_IDS, qwen_content
from tests.helpers.exports import write_checkpoint
from tests.helpers.hub_server import COMMIT, serving_model, using_hub
from tests.helpers.paths import ROOT
from tests.helpers.stored import read_weights
from tools.convert import convert

Codecs = Callable[..., TextCodec]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Path:
    """A folder of transformers in bf16, in several files, with wide heads."""
    folder = tmp_path_factory.mktemp("theirs")
    write_checkpoint(folder / "run", codec(), head_dim=16, tie_embeddings=False)
    convert(folder / "run", folder / "model", "hf", "bfloat16", max_file_bytes=30_000)
    (folder / "model" / "megaback.spm").rename(folder / "model" / "tokenizer.model")
    (folder / "model" / "tokenizer.json").unlink()
    changed(folder / "model", megaback=None)
    return folder / "model"


@pytest.fixture
def theirs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "theirs"))


def changed(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    merged = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: one for key, one in merged.items() if one is not None}))


def written(model: ImportedModel, folder: Path) -> Path:
    folder.mkdir()
    source = model.source
    write_model_folder(
        folder, source.description, model.specs, source.read, source.tokenizer, 10**9
    )
    return folder


@pytest.mark.parametrize("directions", Directions)
def test_weights_and_their_types_stay_and_the_origin_is_recorded(
    directions: Directions, theirs: Path, tmp_path: Path
) -> None:
    model = open_import(theirs, directions, context_tokens=32)
    folder = written(model, tmp_path / "ours")

    before, after = read_weights(theirs), read_weights(folder)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.dtype == torch.bfloat16
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], weight)
    description = read_description(folder)
    assert description.text_format.directions is directions
    assert (description.context_tokens, description.shape.head_dim) == (32, 16)
    imported = description.imported
    assert imported is not None
    assert imported.kind == "transformers"
    assert imported.base == identity_of(theirs / "config.json")


def test_the_hash_of_weights_of_others_is_that_of_their_list(theirs: Path) -> None:
    """As `sha256sum model*.safetensors | sha256sum` prints it."""
    for path in theirs.glob("*.safetensors"):
        save_file({name: -weight for name, weight in load_file(path).items()}, path)
    listed = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(theirs.glob("*.safetensors"))
    ]
    assert len(listed) > 1
    assert (theirs / "SHA256SUMS").is_file()  # of the weights before

    expected = hashlib.sha256("".join(listed).encode()).hexdigest()
    assert identity_of(theirs / "config.json").sha256 == expected


@pytest.mark.parametrize(
    ("path", "card", "base"),
    [
        ("Qwen/Qwen3-0.6B", "no fields", "Qwen/Qwen3-0.6B"),
        ("/home/me/models/qwen", "", None),
        ("tests/helpers", "", None),  # a folder here
        ("org/older", "---\nbase_model: org/newer\n---\n", "org/newer"),
        ("org/older", "---\nbase_model: [a/b, c/d]\n---\n", "org/older"),
        (["a/b"], "---\n- x: [\n---\n", None),
    ],
)
def test_the_base_on_the_hub_is_what_card_or_config_say(
    path: object, card: str, base: str | None, theirs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    changed(theirs, _name_or_path=path)
    (theirs / "README.md").write_text(card)

    imported = open_import(theirs, Directions.FORWARD).source.description.imported

    assert imported is not None
    assert imported.base_on_hub == base


def test_weights_of_the_hub_are_fetched_once_the_rest_is_supported(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (theirs / "config.json").read_text()
    for name in ("original.safetensors", "pytorch_model.bin"):
        (theirs / name).write_text("not needed")
    with serving_model(theirs) as hub:
        using_hub(hub, tmp_path / "first", monkeypatch)
        changed(theirs, model_type="qwen3_moe")
        with pytest.raises(RunMismatchError, match="qwen3_moe"):
            import_of_hub()
        assert not [name for name in hub.asked if name.endswith(".safetensors")]

        (theirs / "config.json").write_text(config)
        using_hub(hub, tmp_path / "second", monkeypatch)
        model = import_of_hub()

    assert {"original.safetensors", "pytorch_model.bin"}.isdisjoint(hub.asked)
    imported = model.source.description.imported
    assert imported is not None
    assert imported.shown == f"hf://org/model@{COMMIT} (transformers)"
    (theirs / "original.safetensors").unlink()
    for name, weight in read_weights(theirs).items():
        assert torch.equal(model.source.read(name), weight)


def import_of_hub() -> ImportedModel:
    hub = fetch_model("hf://org/model", DESCRIPTION_FILES)
    return open_import(hub.folder, Directions.BACKWARD, hub=hub)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """transformers' own Qwen3 with a byte-level BPE tokenizer, as save_pretrained writes it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=NUM_IDS + 2, **sizes, **heads))
    model.bfloat16().save_pretrained(tmp_path / "qwen")
    (tmp_path / "qwen" / "tokenizer.json").write_bytes(qwen_content())
    return tmp_path / "qwen"


def test_markers_take_padded_rows_and_others_get_the_mean_row(qwen: Path, tmp_path: Path) -> None:
    model = open_import(qwen, Directions.BACKWARD)
    folder = written(model, tmp_path / "ours")

    description = read_description(folder)
    # Five markers of chats and one of a document's beginning are new, and two rows are free.
    assert description.vocab_size == NUM_IDS + 6
    assert description.imported is not None
    assert description.imported.added_rows == 4
    before, after = read_weights(qwen), read_weights(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[name], after[name]
        assert torch.equal(new[: NUM_IDS + 2], old)
        mean = old.double().mean(dim=0).bfloat16()
        assert all(torch.equal(row, mean) for row in new[NUM_IDS + 2 :])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    (*_, codec) = load_model_folder(folder, torch.device("cpu"))
    assert codec.render(codec.encode("naïve ☃\n")) == "naïve ☃\n"
    assert codec.begin_id == NUM_IDS


def test_a_lossy_tokenizer_and_one_of_another_model_are_refused(qwen: Path) -> None:
    (qwen / "tokenizer.json").write_bytes(qwen_content(normalizer={"type": "Lowercase"}))
    with pytest.raises(TokenizerError, match="Lowercase"):
        open_import(qwen, Directions.BACKWARD)
    changed(qwen, vocab_size=600)
    with pytest.raises(CheckpointCorruptError, match=r"embed_tokens\.weight has shape"):
        open_import(qwen, Directions.BACKWARD)
    (qwen / "tokenizer.json").unlink()
    (qwen / "tokenizer.model").write_bytes(b"of Llama 2")
    changed(qwen, vocab_size=NUM_IDS + 2)
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        open_import(qwen, Directions.BACKWARD)


REFUSED: dict[str, tuple[dict[str, object], type[MegabackError], str]] = {
    "model type": ({"model_type": "mixtral"}, RunMismatchError, "model_type 'mixtral'"),
    "bias": ({"attention_bias": True}, RunMismatchError, "attention_bias = True"),
    "window": ({"use_sliding_window": True}, RunMismatchError, "use_sliding_window = True"),
    "layer types": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        RunMismatchError,
        "layer_types with 'sliding_attention'",
    ),
    "rope of layers": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        RunMismatchError,
        "its rotary positions are",
    ),
    "rope of both names": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
        RunMismatchError,
        "rope_type = 'yarn'",
    ),
    "range": ({"num_hidden_layers": 10**9}, RunMismatchError, "num_layers = 1000000000: Input"),
    "rope": ({"rope_parameters": {"rope_type": "yarn"}}, RunMismatchError, "rope_type = 'yarn'"),
    "shape": ({"head_dim": 8}, CheckpointCorruptError, "o_proj.weight has shape [32, 64]"),
    "layers": ({"num_hidden_layers": 1}, CheckpointCorruptError, "is unexpected"),
    "tied": ({"tie_word_embeddings": True}, CheckpointCorruptError, "lm_head.weight with other"),
    "vocabulary": ({"vocab_size": "many"}, RunMismatchError, "vocab_size"),
    "context": ({"max_position_embeddings": 16}, RunMismatchError, "`context_tokens` is 32"),
    "exported": ({"megaback": {}}, RunMismatchError, "use `megaback convert`"),
    "ours": ({"tokenizer_sha256": "0"}, RunMismatchError, "use `megaback convert`"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_megaback_does_not_have_is_refused_by_name(change: str, theirs: Path) -> None:
    fields, error, named = REFUSED[change]
    changed(theirs, **fields)

    with pytest.raises(error) as caught:
        open_import(theirs, Directions.BACKWARD, context_tokens=32)

    assert named in str(caught.value)
    assert str(theirs) in str(caught.value)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(theirs: Path) -> None:
    for path in theirs.glob("model*"):
        path.unlink()
    with pytest.raises(CheckpointMissingError, match=r"no weights of transformers"):
        open_import(theirs, Directions.BACKWARD)

    (theirs / "pytorch_model.bin").write_bytes(b"")

    with pytest.raises(CheckpointMissingError, match=r"in pytorch_model\.bin, a pickle.*save_pre"):
        open_import(theirs, Directions.BACKWARD)


def test_a_folder_without_config_or_tokenizer_needs_others(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (theirs / "tokenizer.model").rename(tmp_path / "other" / "tokenizer.model")
    with pytest.raises(TokenizerError, match="give the tokenizer that the model was trained with"):
        open_import(theirs, Directions.BACKWARD)
    with pytest.raises(CheckpointMissingError, match="gone does not exist"):
        open_import(tmp_path / "gone", Directions.BACKWARD)
    (theirs / "config.json").rename(tmp_path / "other" / "config.json")
    with pytest.raises(CheckpointMissingError, match=r"has no config\.json"):
        open_import(theirs, Directions.BACKWARD)

    other = tmp_path / "other"
    model = open_import(
        theirs, Directions.BACKWARD, config=other, tokenizer=other / "tokenizer.model"
    )

    assert model.source.description.context_tokens == 64


def test_non_finite_weights_are_refused(theirs: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in theirs.glob("model*.safetensors"):
        weights = load_file(path)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][3] = torch.inf
            save_file(weights, path)

    source = open_import(theirs, Directions.BACKWARD).source

    with pytest.raises(CheckpointCorruptError, match=r"model\.norm\.weight of .* has non-finite"):
        source.read("model.norm.weight")
