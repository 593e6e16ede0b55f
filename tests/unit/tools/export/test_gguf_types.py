"""Types of a GGUF file's tensors, their values, and what llama.cpp makes of them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from data_pipeline.errors import BackendError
from data_pipeline.text.codec import TextCodec
from megaback.config import ModelSection
from megaback.model.gpt import ReverseGPT
from tests.helpers.exports import write_checkpoint
from tools import convert
from tools.export import gguf_types
from tools.export.gguf import gguf_name_of
from tools.export.gguf_types import TYPES, GgufType

Codecs = Callable[..., TextCodec]
# Root mean square of the errors of normally distributed weights, relative to theirs.
MAX_ERRORS = {
    "float32": 0.0,
    "bfloat16": 0.003,
    "float16": 0.0005,
    "q8_0": 0.008,
    "q6_k": 0.03,
    "q5_k_m": 0.05,
    "q4_k_m": 0.1,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> tuple[Path, ReverseGPT]:
    """A run with rows of 256 weights, but for the MLP's of 96."""
    run = tmp_path_factory.mktemp("run")
    shape = {"width": 256, "num_layers": 3, "mlp_width": 96, "tie_embeddings": True}
    return run, write_checkpoint(run, codec(), ranks=1, **shape)[1]


def tensors_of(path: Path) -> dict[str, Any]:
    import gguf

    return {one.name: one for one in gguf.GGUFReader(path).tensors}


def test_each_type_holds_the_weights_to_its_precision(
    trained: tuple[Path, ReverseGPT], tmp_path: Path
) -> None:
    import gguf

    pytest.importorskip("xllamacpp", reason="llama.cpp's quantizers are not installed")
    run, model = trained
    weights = {gguf_name_of(name): one.detach().numpy() for name, one in model.named_parameters()}
    sizes = []
    for name in TYPES:
        convert.convert(run, tmp_path / name, "gguf", name)
        path = tmp_path / name / "model.gguf"
        sizes.append(path.stat().st_size)
        for tensor, one in tensors_of(path).items():
            found = gguf.quants.dequantize(one.data, one.tensor_type)
            off = np.sqrt(np.mean((found.reshape(weights[tensor].shape) - weights[tensor]) ** 2))
            assert off <= MAX_ERRORS[name] * np.sqrt(np.mean(weights[tensor] ** 2)), (name, tensor)
    float32, bfloat16, float16, *quantized = sizes
    assert float32 > bfloat16 == float16 > quantized[0]
    assert sorted(quantized, reverse=True)[0] == quantized[0] > quantized[-1] > quantized[1]


def test_types_are_those_of_llama_quantize(
    trained: tuple[Path, ReverseGPT], tmp_path: Path
) -> None:
    """Q4_K_M: more bits for the head, and in some layers for values and the MLP's output."""
    pytest.importorskip("xllamacpp", reason="llama.cpp's quantizers are not installed")
    command = [trained[0], "--to", "gguf", "--outtype", "q4_k_m", "--out", tmp_path / "model"]
    result = CliRunner().invoke(convert.main, list(map(str, command)), catch_exceptions=False)

    assert result.exit_code == 0, result.output
    found = tensors_of(tmp_path / "model/model.gguf")
    kinds = {name: one.tensor_type.name for name, one in found.items()}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.attn_v.weight"] == "Q4_K"
    assert kinds["blk.2.attn_v.weight"] == "Q6_K"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in (0, 2)] == ["Q5_0", "Q8_0"]
    for layer, kind in ((0, "q5_0"), (2, "q8_0")):
        assert f"another type: {kind} blk.{layer}.ffn_down.weight" in result.output


def test_values_of_a_llama_70b_have_more_bits() -> None:
    """A Llama with 80 layers and grouped queries, as llama.cpp recognizes it."""
    shape = ModelSection(num_layers=80, width=512, num_heads=8, num_kv_heads=2, qk_norm=False)
    for of_model, kind in (
        (shape, "Q5_K"),
        (shape.model_copy(update={"num_layers": 79}), "Q4_K"),
        (shape.model_copy(update={"num_kv_heads": 8}), "Q4_K"),
        (shape.model_copy(update={"qk_norm": True}), "Q4_K"),
    ):
        of_file = GgufType("q4_k_m", of_model)
        assert of_file.of("blk.10.attn_v.weight", (128, 512)) == kind
        assert of_file.of("blk.10.attn_k.weight", (128, 512)) == "Q4_K"
        assert of_file.of("blk.75.attn_v.weight", (128, 512)) == "Q6_K"


def test_a_type_of_gguf_is_for_gguf_only(trained: tuple[Path, ReverseGPT], tmp_path: Path) -> None:
    command = [trained[0], "--to", "hf", "--dtype", "q8_0", "--out", tmp_path / "model"]
    result = CliRunner().invoke(convert.main, list(map(str, command)))
    assert result.exit_code == 2
    assert "--dtype q8_0 is for --to gguf" in result.output


def test_k_quants_without_llama_cpp_name_what_to_install(
    trained: tuple[Path, ReverseGPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_types._llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(BackendError, match=r"pip install xllamacpp.*llama-quantize"):
        convert.convert(trained[0], tmp_path / "model", "gguf", "q4_k_m")
    assert not (tmp_path / "model").exists()
    convert.convert(trained[0], tmp_path / "model", "gguf", "q8_0")
