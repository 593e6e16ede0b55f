"""Unexpected, missing and mismatched weights in a model folder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import CheckpointCorruptError, RunMismatchError
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.safetensors_file import size_and_hash, write_tensors
from megaback.model.gpt import ReverseGPT
from megaback.weights.init_from import open_base
from megaback.weights.model_folder import load_model_folder, read_description
from megaback.weights.source import open_source
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

CPU = torch.device("cpu")
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
EMBEDDINGS = "model.embed_tokens.weight"
Weights = dict[str, Tensor]
Change = Callable[[Weights], object]


def nothing(weights: Weights) -> None:
    """Leave the model unchanged."""


def head_of_its_own(weights: Weights) -> None:
    weights["lm_head.weight"] = weights[EMBEDDINGS] + 1


def head_twice(weights: Weights) -> None:
    weights["lm_head.weight"] = weights[EMBEDDINGS].clone()


def frequencies(theta: float) -> Change:
    def add(weights: Weights) -> None:
        weights[FREQUENCIES] = theta ** -(torch.arange(0, 8, 2) / 8)

    return add


def bias(weights: Weights) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)


def no_norm(weights: Weights) -> None:
    del weights["model.norm.weight"]


def narrow_norm(weights: Weights) -> None:
    weights["model.norm.weight"] = torch.ones(31)


WRONG = {
    "head": (head_of_its_own, "lm_head.weight"),
    "frequencies": (frequencies(5e5), "rope_theta 10000"),
    "bias": (bias, r"q_proj.bias of shape \[32\] is unexpected"),
    "missing": (no_norm, "model.norm.weight is missing"),
    "shape": (narrow_norm, r"model.norm.weight has shape \[31\], not \[32\]"),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    """A Llama of another library, with tied embeddings."""
    folder = tmp_path_factory.mktemp("stock")
    write_checkpoint(folder / "run", codec(), tie_embeddings=True, qk_norm=False)
    convert(folder / "run", folder / "model", "hf", "float32")
    (folder / "model" / "megaback.spm").rename(folder / "model" / "tokenizer.model")
    fields = json.loads((folder / "model" / "config.json").read_text())
    del fields["megaback"]
    (folder / "model" / "config.json").write_text(json.dumps(fields))
    return folder / "model"


def changed(stock: Path, folder: Path, change: Change) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((stock / name).read_bytes())
    weights = load_file(stock / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def base_of(folder: Path, codec: TextCodec) -> ReverseGPT:
    description = read_description(folder)
    model = ReverseGPT(description.shape, description.vocab_size)
    base = open_base(folder, model.shape, model.vocab_size, codec.format, "the run")
    base.fill(model)
    return model


@pytest.mark.parametrize(("change", "named"), WRONG.values(), ids=WRONG)
def test_every_reader_refuses_weights_that_do_not_match_the_config(
    change: Change, named: str, stock: Path, tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    folder = changed(stock, tmp_path / "model", change)

    readers = (
        lambda: base_of(folder, codec()),
        lambda: load_model_folder(folder, CPU),
        lambda: open_source(folder),
    )
    for read in readers:
        with pytest.raises(CheckpointCorruptError, match=named):
            read()


@pytest.mark.parametrize("change", [head_twice, frequencies(1e4)], ids=["head", "frequencies"])
def test_redundant_tensors_that_agree_are_accepted(
    change: Change, stock: Path, tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    model = base_of(changed(stock, tmp_path / "model", change), codec())

    assert torch.equal(model.lm_head.weight, load_file(stock / "model.safetensors")[EMBEDDINGS])


@pytest.mark.parametrize("other", ["model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_a_weight_file_that_would_not_be_read_is_reported(
    other: str, stock: Path, tmp_path: Path
) -> None:
    folder = changed(stock, tmp_path / "model", head_twice)
    save_file({"more": torch.ones(3)}, folder / other)

    with pytest.raises(CheckpointCorruptError, match=f"contains {other} beside model.safetensors"):
        open_source(folder)


def test_a_tensor_in_two_files_is_refused(stock: Path, tmp_path: Path) -> None:
    folder = changed(stock, tmp_path / "model", nothing)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (folder / name).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": names[0], EMBEDDINGS: names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointCorruptError, match=f"{names[1]} contains .* and so does another"):
        open_source(folder)


def test_a_model_with_custom_code_is_refused(stock: Path, tmp_path: Path) -> None:
    folder = changed(stock, tmp_path / "model", nothing)
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_theirs.TheirModel"}
    (folder / "config.json").write_text(json.dumps(fields))

    with pytest.raises(RunMismatchError, match="custom model code"):
        read_description(folder)


def test_a_checkpoint_with_weights_of_another_model_is_refused(
    tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    target, _ = write_checkpoint(tmp_path / "run", codec(), ranks=1)
    (name,) = [path.name for path in target.glob("weights-*")]
    weights = load_file(target / name)
    weights["weight:model.layers.2.mlp.up_proj.weight:0"] = torch.ones(4)
    specs = {key: (part.dtype, part.shape) for key, part in weights.items()}
    write_tensors(target / name, specs, weights.__getitem__)
    meta = json.loads((target / "meta.json").read_text())
    meta["files"][name] = size_and_hash(target / name)
    (target / "meta.json").write_text(json.dumps(meta))

    with pytest.raises(CheckpointCorruptError, match=r"up_proj.weight is unexpected"):
        open_source(target)
