"""Data types of a GGUF file: of each tensor, and how its weights are quantized.

f32, bf16, f16 and q8_0 need the package gguf only. The k-quants are computed by llama.cpp's own
functions, in the library of the package xllamacpp, with the mixture of types that `llama-quantize`
uses without an importance matrix:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp, `llama_tensor_get_type`.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import BackendError
from megaback.config import ModelSection

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
K_QUANTS = {"q4_k_m": ("Q4_K", True), "q5_k_m": ("Q5_K", True), "q6_k": ("Q6_K", False)}
"""Type of most matrices, and whether some have the type with more bits, by name."""
TYPES = (*FLOATS, "q8_0", *K_QUANTS)
_MORE_BITS = "Q6_K"
_SUPER_BLOCK = 256
_BLOCK = 32
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FILE_TYPES = {"q8_0": "Q8_0", "q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M", "q6_k": "Q6_K"}
_TORCH = {"F32": torch.float32, "F16": torch.float16}


@dataclass(frozen=True)
class GgufType:
    """A file's type by name, for a model's shape."""

    name: str
    shape: ModelSection

    def of(self, tensor: str, shape: tuple[int, ...]) -> str:
        """ggml's name of the type of one tensor: F32 for norms, as llama.cpp requires.

        Rows that a type does not divide have llama.cpp's fallback.
        """
        if len(shape) == 1:
            return "F32"
        if self.name in FLOATS:
            return FLOATS[self.name]
        usual = "Q8_0" if self.name == "q8_0" else self._k_quant(tensor)
        if shape[-1] % _BLOCK:
            return "F16"
        return usual if usual == "Q8_0" or shape[-1] % _SUPER_BLOCK == 0 else _FALLBACKS[usual]

    def is_fallback(self, tensor: str, shape: tuple[int, ...]) -> bool:
        """Whether a matrix has another type than its rows would have if they were divisible."""
        return len(shape) > 1 and self.of(tensor, shape) != self.of(tensor, (1, _SUPER_BLOCK))

    @property
    def file_type(self) -> str:
        """Name in gguf's `LlamaFileType`."""
        if self.name == "float32":
            return "ALL_F32"
        return f"MOSTLY_{FLOATS.get(self.name) or _FILE_TYPES[self.name]}"

    def _k_quant(self, tensor: str) -> str:
        usual, is_mixed = K_QUANTS[self.name]
        head = "token_embd.weight" if self.shape.tie_embeddings else "output.weight"
        if tensor == head:
            return _MORE_BITS
        is_value = tensor.endswith(".attn_v.weight")
        if is_mixed and (is_value or tensor.endswith(".ffn_down.weight")):
            layer, count = int(tensor.split(".")[1]), self.shape.num_layers
            eighth = count // 8
            if layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2:
                return _MORE_BITS
        return "Q5_K" if is_value and usual == "Q4_K" and self._is_llama_70b else usual

    @property
    def _is_llama_70b(self) -> bool:
        """Whether llama.cpp takes it for Llama 70B, whose values have few heads and more bits."""
        shape = self.shape
        return shape.num_layers == 80 and not shape.qk_norm and shape.kv_heads != shape.num_heads


def quantizer(type_name: str) -> Callable[[Tensor], npt.NDArray[Any]]:
    """The function that makes the bytes of a matrix in ggml's type.

    Raises BackendError if it is llama.cpp's and the package xllamacpp is missing.
    """
    import gguf

    if type_name in _TORCH:
        return lambda weight: weight.to(_TORCH[type_name]).contiguous().numpy()
    if type_name == "BF16":
        return lambda weight: weight.bfloat16().contiguous().view(torch.int16).numpy()
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name not in _FALLBACKS:
        return lambda weight: np.asarray(gguf.quants.quantize(_fp32(weight), kind))
    library = _llama_cpp()

    def quantize(weight: Tensor) -> npt.NDArray[Any]:
        rows = _fp32(weight)
        made = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, kind), dtype=np.uint8)
        pointer = ctypes.POINTER(ctypes.c_float)
        written = library.ggml_quantize_chunk(
            int(kind),
            rows.ctypes.data_as(pointer),
            made.ctypes.data_as(ctypes.c_void_p),
            *(0, rows.shape[0], rows.shape[1], None),
        )
        assert written == made.nbytes
        return made

    return quantize


def _fp32(weight: Tensor) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = weight.float().contiguous().numpy()
    return found


@cache
def _llama_cpp() -> Any:
    try:
        import xllamacpp

        library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        function = library.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError):
        raise BackendError(
            "k-quants are computed by llama.cpp; install it with `pip install xllamacpp`, or "
            "export float32 and run llama.cpp's `llama-quantize model.gguf NEW.gguf TYPE`"
        ) from None
    size = ctypes.c_int64
    floats = ctypes.POINTER(ctypes.c_float)
    function.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, size, size, size, floats]
    function.restype = ctypes.c_size_t
    return library
