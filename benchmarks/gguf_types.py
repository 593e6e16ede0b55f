"""Loss and size of a model by the data type of its GGUF file.

    python benchmarks/gguf_types.py MODEL SHARDS

Prints the table of docs/results.md: file size, and bits/byte of the val set of SHARDS with the
weights that the file holds, dequantized by the package gguf and run by megaback in fp32. llama.cpp
also rounds activations: of the package xllamacpp, the last column is the root mean square of the
differences between its log-probabilities and these, at the ends of some rows.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from smoke import Benchmark, is_installed
from torch import Tensor

from data_pipeline.errors import BackendError
from data_pipeline.loading.loader import SequentialRows
from data_pipeline.text.codec import TextCodec
from megaback.config_data import DataSection
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.model.gpt import ReverseGPT
from megaback.open_shards import open_shards
from megaback.run_folder import GGUF_NAME
from megaback.tracking.loss_by_context import Loss
from megaback.weights.model_folder import empty_model
from megaback.weights.source import WeightSource, open_source
from tools.export.gguf import as_llama_cpp_has_it, gguf_name_of, write_gguf_folder
from tools.export.gguf_types import TYPES
from tools.suites.loss_sums import loss_sums

_CPU = torch.device("cpu")
_MAX_PREFIX_TOKENS = 100
_LLAMA_CPP = """
import json, os, sys
import xllamacpp

path, asked = sys.argv[1], json.loads(sys.argv[2])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 128, False, -1
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
found = []
for ids, vocab_size in asked:
    request = {"prompt": ids[:-1], "n_predict": 1, "temperature": 0, "n_probs": vocab_size}
    logprobs = server.handle_completions(request)["choices"][0]["logprobs"]
    places = logprobs["content"] if logprobs else []  # nothing if the likeliest id is a byte
    tops = {one["id"]: one["logprob"] for place in places for one in place["top_logprobs"]}
    found.append(tops.get(ids[-1]))
print()
print(json.dumps(found), flush=True)
os._exit(0)  # its threads do not end by themselves
"""


def dequantized(path: Path, source: WeightSource) -> dict[str, Tensor]:
    """The weights of a file under their names here, in fp32."""
    import gguf

    stored = {one.name: one for one in gguf.GGUFReader(path).tensors}
    shape = source.description.shape
    found = {}
    for name, size in source.shapes.items():
        one = stored[gguf_name_of(name)]
        weight = torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        order = torch.arange(size[0])[:, None]  # of rows, which llama.cpp's rotation exchanges
        places = as_llama_cpp_has_it(name, order, shape)[:, 0] if len(size) > 1 else order[:, 0]
        found[name] = torch.empty(size).index_copy_(0, places, weight.reshape(size).float())
    return found


def loss_of(model: ReverseGPT, rows: SequentialRows, codec: TextCodec) -> Loss:
    sums = [0.0, 0.0, 0.0]
    num_bytes = codec.piece_num_bytes()
    for of_batch in loss_sums(model, rows.slices(0, rows.num_rows, 8, 8), num_bytes, _CPU):
        sums = [total + one for total, one in zip(sums, of_batch, strict=True)]
    return Loss.of_sums(*sums)


def deviation(path: Path, model: ReverseGPT, prefixes: list[list[int]], vocab_size: int) -> float:
    """RMS difference between llama.cpp's log P of the last ids and the model's, in nats."""
    asked = json.dumps([[ids, vocab_size] for ids in prefixes])
    command = [sys.executable, "-c", _LLAMA_CPP, str(path), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    here = log_probabilities(model, [Continuation(ids[:-1], ids[-1:]) for ids in prefixes])
    both = [(one, other) for one, other in zip(found, here, strict=True) if one is not None]
    squares = [(one - other) ** 2 for one, other in both]
    return float((sum(squares) / max(len(squares), 1)) ** 0.5)


@click.command(cls=Benchmark, smoke="{backward} {shards} --prefixes 3")
@click.argument("path", metavar="MODEL", type=click.Path(path_type=Path))
@click.argument("shards")
@click.option("--prefixes", "num_prefixes", default=100, show_default=True, type=int)
def main(path: Path, shards: str, num_prefixes: int) -> None:
    """Measure the val loss of MODEL with the weights of each type of a GGUF file."""
    has_llama_cpp = is_installed("llama.cpp", "xllamacpp")
    source = open_source(path)
    description = source.description
    codec = TextCodec.of(source.tokenizer, description.text_format)
    direction = description.text_format.directions.value
    section = DataSection.model_validate({"shards": shards, "direction": direction})
    rows = SequentialRows(open_shards(section).val_rows(description.context_tokens), 0, 1, 1)
    prefixes = []
    for batch in rows.slices(0, min(num_prefixes, rows.num_rows), 1, 1):
        prefixes.append(batch.ids_T[: int(batch.cu_seqlens[1])].tolist()[:_MAX_PREFIX_TOKENS])
    prefixes = [ids for ids in prefixes if len(ids) > 1]
    model = empty_model(path, description, _CPU, torch.float32)
    num_weights = sum(one.numel() for one in model.parameters())
    print("| type | file | bits per weight | val bits/byte | more than float32 | llama.cpp |")
    print("|---|---|---|---|---|---|")
    first: float | None = None
    for name in TYPES:
        with TemporaryDirectory() as folder:
            try:
                write_gguf_folder(Path(folder), name, source, name)
            except BackendError:
                print(f"| {name} | needs the package xllamacpp |")
                continue
            file = Path(folder) / GGUF_NAME
            model.load_state_dict(dequantized(file, source), strict=False)
            bits = loss_of(model, rows, codec).bits_per_byte or 0.0
            first = bits if first is None else first
            apart = "-"
            if has_llama_cpp:
                apart = f"{deviation(file, model, prefixes, codec.vocab_size):.1e} nats"
            size = file.stat().st_size
            print(
                f"| {name} | {size / 1e6:.2f} MB | {8 * size / num_weights:.2f} | {bits:.4f} | "
                f"{bits - first:+.4f} | {apart} |"
            )


if __name__ == "__main__":
    main()
