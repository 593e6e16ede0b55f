"""Tokens per second of sampling: ours, transformers' `generate`, no KV cache, and the bound.

    python benchmarks/sample.py [--layers 6] [--width 384] [--heads 6] \
        [--max-new-tokens 500] [--turns 3]

One thread, CPU time, all with the same weights and dtype, a prompt of 16 ids, temperature 0.8,
top_k 200, and no end marker. Sampling without a KV cache, as the BackGPT experiment did, is timed
at every fiftieth length. The bound is the time to read the weights (once per step) and the keys and
values (of every row) at this machine's measured memory bandwidth.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch
from smoke import Benchmark
from transformers import AutoConfig, AutoModelForCausalLM

from data_pipeline.text.codec import Prompt
from megaback.config import ModelSection
from megaback.inference.decoder import Decoder
from megaback.inference.generate import generate_many
from megaback.inference.sampling import SamplingOptions
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.weights.hf_config import to_stock

VOCAB_SIZE = 8_888
CONTEXT_TOKENS = 1_024
GIVEN_TOKENS = 16
EVERY = 50
BATCHES = (1, 16)
ALL_IDS = np.arange(VOCAB_SIZE)
CODEC: Any = SimpleNamespace(end_id=-1, vocab_size=VOCAB_SIZE, writable_ids=lambda _end_id: ALL_IDS)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads."""
    started = time.process_time()
    work()
    return time.process_time() - started


def bandwidth() -> float:
    """Memory bandwidth of one thread, in bytes per second."""
    data = torch.ones(1 << 27)
    return data.nbytes / min(cpu_seconds(data.sum) for _ in range(5))


def new_model(shape: ModelSection, dtype: torch.dtype) -> ReverseGPT:
    model = ReverseGPT(shape, VOCAB_SIZE)
    model.initialize(0)
    return model.to(dtype).eval()


def stock_model(model: ReverseGPT) -> Any:
    """transformers' model with the same weights, from an export."""
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    fields = to_stock(model.shape, VOCAB_SIZE, CONTEXT_TOKENS, dtype)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    stock = AutoModelForCausalLM.from_config(config, dtype=model.lm_head.weight.dtype).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def write_ours(decoder: Decoder, rows: int, tokens: int) -> None:
    prompts = [Prompt(list(range(GIVEN_TOKENS)), ALL_IDS, CODEC.end_id)] * rows
    count = sum(1 for _ in generate_many(decoder, CODEC, prompts, SamplingOptions(tokens)))
    assert count == tokens


@torch.inference_mode()
def write_stock(stock: Any, rows: int, tokens: int) -> None:
    given = torch.arange(GIVEN_TOKENS).repeat(rows, 1)
    ids = stock.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=True,
        temperature=0.8,
        top_k=200,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ids.shape == (rows, GIVEN_TOKENS + tokens)


@torch.inference_mode()
def uncached_seconds(model: ReverseGPT, rows: int, tokens: int) -> float:
    """CPU time of `tokens` steps without a KV cache, excluding the choice of the token."""

    def step(length: int) -> None:
        ids = torch.zeros(rows * length, dtype=torch.long)
        segments = Segments.from_lengths((length,) * rows, ids.device)
        hidden = model.hidden(ids, torch.arange(length).repeat(rows), segments)
        model.lm_head(hidden[length - 1 :: length])

    lengths = range(GIVEN_TOKENS + EVERY // 2, GIVEN_TOKENS + tokens, EVERY)
    return EVERY * sum(cpu_seconds(lambda length=length: step(length)) for length in lengths)


@click.command(cls=Benchmark, smoke="--layers 1 --width 32 --heads 2 --max-new-tokens 50 --turns 1")
@click.option("--layers", default=6, show_default=True, help="Number of layers.")
@click.option("--width", default=384, show_default=True, help="Model width.")
@click.option("--heads", default=6, show_default=True, help="Number of attention heads.")
@click.option("--max-new-tokens", default=500, show_default=True, help="New tokens per sample.")
@click.option(
    "--turns", default=3, show_default=True, help="Turns per contender; medians are printed."
)
def main(layers: int, width: int, heads: int, max_new_tokens: int, turns: int) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    shape = ModelSection(num_layers=layers, width=width, num_heads=heads)
    bytes_per_s = bandwidth()
    parameters = new_model(shape, torch.float32).num_parameters()
    print(f"{parameters / 1e6:.0f} million parameters, {bytes_per_s / 1e9:.1f} GB/s")
    print("dtype    rows   ours  bound transformers no cache vs transformers vs no cache of bound")
    for dtype in (torch.float32, torch.bfloat16):
        model = new_model(shape, dtype)
        stock = stock_model(model)
        for rows in BATCHES:
            decoder = Decoder(new_model(shape, dtype), CONTEXT_TOKENS, usual_rows=rows)
            write_ours(decoder, rows, 3)
            write_stock(stock, rows, 3)
            times: dict[str, list[float]] = {"ours": [], "stock": []}
            for _ in range(turns):
                times["ours"].append(
                    cpu_seconds(partial(write_ours, decoder, rows, max_new_tokens))
                )
                times["stock"].append(
                    cpu_seconds(partial(write_stock, stock, rows, max_new_tokens))
                )
            ours, theirs = (statistics.median(taken) for taken in times.values())
            uncached = uncached_seconds(model, rows, max_new_tokens)
            weight_bytes = (parameters - VOCAB_SIZE * width) * dtype.itemsize
            length = GIVEN_TOKENS + max_new_tokens / 2
            cached = 2 * layers * shape.kv_width * decoder.cache_dtype.itemsize
            bound = max_new_tokens * (weight_bytes + rows * length * cached) / bytes_per_s
            written = rows * max_new_tokens
            print(
                f"{str(dtype).removeprefix('torch.'):8} {rows:4} {written / ours:6.0f} "
                f"{written / bound:6.0f} {written / theirs:12.0f} {written / uncached:8.1f} "
                f"{theirs / ours:15.2f} {uncached / ours:11.1f} {bound / ours:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
