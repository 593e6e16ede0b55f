"""Loss and size of a model by the data type of its GGUF file.

    python benchmarks/gguf_types.py MODEL SHARDS

Prints a table of docs/results.md: file size, and bits/byte of the val set of SHARDS in llama.cpp,
the library of the package xllamacpp with its defaults, with the standard error over documents of
the difference to the first type; before it, bits/byte of MODEL here, in fp32.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from smoke import Benchmark, is_installed

from data_pipeline.loading.loader import SequentialRows
from data_pipeline.loading.rows import IGNORED_TARGET
from data_pipeline.text.codec import TextCodec
from megaback.config_data import DataSection
from megaback.open_shards import open_shards
from megaback.run_folder import GGUF_NAME
from megaback.scoring.paired_difference import Losses, PairedDifference
from megaback.tracking.loss_by_context import Loss
from megaback.weights.model_folder import empty_model
from megaback.weights.source import open_source
from tools.export.gguf import write_gguf_folder
from tools.export.gguf_types import TYPES
from tools.suites.loss_sums import loss_sums

_CPU = torch.device("cpu")
_NATS_PER_BIT = float(np.log(2))
_DECODED_TOKENS = 512
"""Most tokens of a call of llama.cpp, within its default batch."""


class _Parameters(ctypes.Structure):
    """llama.cpp's parameters by value, of which one is changed: more bytes than they have."""

    _fields_ = (("first", ctypes.c_uint32), ("others", ctypes.c_uint8 * 2044))


class _Tokens(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("ids", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("num_sequences", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("has_logits", ctypes.POINTER(ctypes.c_int8)),
    )


def _library() -> Any:
    """llama.cpp's functions, by https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h."""
    import xllamacpp

    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    address = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_log_set", None, (address, address)),
        ("llama_model_default_params", _Parameters, ()),
        ("llama_context_default_params", _Parameters, ()),
        ("llama_model_load_from_file", address, (ctypes.c_char_p, _Parameters)),
        ("llama_init_from_model", address, (address, _Parameters)),
        ("llama_set_n_threads", None, (address, ctypes.c_int32, ctypes.c_int32)),
        ("llama_get_memory", address, (address,)),
        ("llama_memory_clear", None, (address, ctypes.c_bool)),
        ("llama_batch_init", _Tokens, (ctypes.c_int32,) * 3),
        ("llama_decode", ctypes.c_int32, (address, _Tokens)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (address,)),
        ("llama_free", None, (address,)),
        ("llama_model_free", None, (address,)),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class LlamaCpp:
    """A GGUF file in llama.cpp, as a function of ids."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._library = _library()
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
            lambda _level, _text, _data: None
        )
        self._library.llama_log_set(self._silence, None)
        self._vocab_size = vocab_size
        self._model = self._library.llama_model_load_from_file(
            str(path).encode(), self._library.llama_model_default_params()
        )
        parameters = self._library.llama_context_default_params()
        parameters.first = 0  # the context of the file
        self._context = self._library.llama_init_from_model(self._model, parameters)
        assert self._context, f"llama.cpp cannot read {path}"
        num_threads = torch.get_num_threads()
        self._library.llama_set_n_threads(self._context, num_threads, num_threads)
        self._tokens = self._library.llama_batch_init(_DECODED_TOKENS, 0, 1)

    def nats(self, ids_S: npt.NDArray[np.int64], targets_S: npt.NDArray[np.int64]) -> float:
        """Sum of the losses of a segment's targets, where there are any."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, True)
        total = 0.0
        for start in range(0, len(ids_S), _DECODED_TOKENS):
            targets = targets_S[start : start + _DECODED_TOKENS]
            logits_SV = torch.from_numpy(
                self._logits(ids_S[start : start + _DECODED_TOKENS], start)
            )
            total += float(
                torch.nn.functional.cross_entropy(
                    logits_SV.double(),
                    torch.from_numpy(targets),
                    ignore_index=IGNORED_TARGET,
                    reduction="sum",
                )
            )
        return total

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    def _logits(self, ids_S: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.float32]:
        tokens = self._tokens
        tokens.count = len(ids_S)
        for place, token_id in enumerate(ids_S.tolist()):
            tokens.ids[place], tokens.positions[place] = token_id, start + place
            tokens.num_sequences[place], tokens.sequences[place][0] = 1, 0
            tokens.has_logits[place] = 1
        assert self._library.llama_decode(self._context, tokens) == 0
        logits = self._library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(ids_S), self._vocab_size))


def segments(rows: SequentialRows) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Ids and targets of each document's part of a row, in the order of the documents."""
    for batch in rows.slices(0, rows.num_rows, 1, 1):
        for start, stop in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
            yield batch.ids_T[start:stop], batch.targets_T[start:stop]


def bits_by_document(path: Path, rows: SequentialRows, codec: TextCodec, vocab_size: int) -> Losses:
    """Bits and bytes of each document of the val set, in llama.cpp."""
    num_bytes = codec.piece_num_bytes()
    model = LlamaCpp(path, vocab_size)
    sums: list[list[float]] = []
    for ids_S, targets_S in segments(rows):
        if not sums or ids_S[0] == codec.begin_id:
            sums.append([0.0, 0.0])
        if (targets := targets_S[targets_S != IGNORED_TARGET]).size:
            sums[-1][0] += model.nats(ids_S, targets_S) / _NATS_PER_BIT
            sums[-1][1] += float(num_bytes[targets].sum())
    model.close()
    bits_N, bytes_N = np.array(sums).T
    return Losses(bits_N, bytes_N)


@click.command(cls=Benchmark, smoke="{backward} {shards}")
@click.argument("path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("shards")
def main(path: Path, shards: str) -> None:
    """Measure the val loss of MODEL by the type of its GGUF file."""
    if not is_installed("llama.cpp", "xllamacpp"):
        return
    source = open_source(path)
    description = source.description
    codec = TextCodec.of(source.tokenizer, description.text_format)
    direction = description.text_format.directions.value
    section = DataSection.model_validate({"shards": shards, "direction": direction})
    rows = SequentialRows(open_shards(section).val_rows(description.context_tokens), 0, 1, 1)
    model = empty_model(path, description, _CPU, torch.float32)
    model.load_state_dict({name: source.read(name) for name in source.shapes}, strict=False)
    sums = loss_sums(model, rows.slices(0, rows.num_rows, 8, 8), codec.piece_num_bytes(), _CPU)
    here = Loss.of_sums(*(sum(column) for column in zip(*sums, strict=True)))
    num_weights = sum(one.numel() for one in model.parameters())
    print(f"{num_weights:,} parameters; in megaback, fp32: {here.bits_per_byte:.4f} bits/byte")
    print("| type | file | bits per weight | val bits/byte | more than f32 |")
    print("|---|---|---|---|---|")
    first: Losses | None = None
    for name in TYPES:
        with TemporaryDirectory() as folder:
            write_gguf_folder(Path(folder), name, source, name)
            file = Path(folder) / GGUF_NAME
            found = bits_by_document(file, rows, codec, description.vocab_size)
            first = first or found
            difference = PairedDifference.between(first, found)
            error = difference.nats_error or 0.0
            size = file.stat().st_size
            print(
                f"| {name} | {size / 1e6:.2f} MB | {8 * size / num_weights:.2f} | "
                f"{found.per_token:.4f} | {difference.nats:+.5f} ± {error:.5f} |",
                flush=True,
            )
    print(f"documents: {difference.num_documents}, bytes: {difference.num_targets:,.0f}")


if __name__ == "__main__":
    main()
