"""Sampled tokens/s of several batch sizes, against the memory's bandwidth and transformers."""

from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import SAMPLE
from data_pipeline.text.codec import Prompt
from megaback.config import ModelSection
from megaback.inference.decoder import Decoder
from megaback.inference.generate import sample_many
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from megaback.weights.hf_config import to_stock

_VOCAB_SIZE = 8_888
_GIVEN_TOKENS = 16
_ALL_IDS = np.arange(_VOCAB_SIZE)
_CODEC: Any = SimpleNamespace(
    end_id=-1, vocab_size=_VOCAB_SIZE, writable_ids=lambda _end_id: _ALL_IDS
)


def run(bench: Bench) -> None:
    context_tokens, tokens = bench.sized(1024, 128, 64), bench.sized(256, 32, 4)
    shape = ModelSection(
        num_layers=bench.sized(12, 2, 1),
        width=bench.sized(1024, 128, 32),
        num_heads=bench.sized(16, 2, 2),
    ).resolved()
    bytes_per_s = _bandwidth(bench)
    bench.measured("memory bandwidth", SAMPLE, bytes_per_s=bytes_per_s)
    model = _new_model(shape, bench)
    stock = None
    if not find_spec("transformers"):
        bench.skip("transformers", "it is not installed")
    else:
        with bench.attempt("transformers"):
            stock = _stock_model(model, context_tokens)
    embedding = model.model.embed_tokens.weight  # of which a row is read
    weight_bytes = sum(one.nbytes for one in model.parameters()) - embedding.nbytes
    for rows in bench.sized((1, 16, 64), (1, 16), (1,)):
        name = f"{rows} rows, bf16" if rows > 1 else "one row, bf16"
        with bench.attempt(name, SAMPLE):
            decoder = Decoder(_new_model(shape, bench), context_tokens, usual_rows=rows)
            _write(decoder, rows, 4)  # what is made at the first step
            ours_s = bench.seconds(partial(_write, decoder, rows, tokens), bench.sized(3, 2, 1))
            # Weights are read once per step, keys and values of every row too.
            kept = 2 * shape.num_layers * shape.kv_width
            length = _GIVEN_TOKENS + tokens / 2
            cached = rows * length * kept * decoder.cache_dtype.itemsize
            bound_s = tokens * (weight_bytes + cached) / bytes_per_s
            theirs_s = None
            if stock is not None:
                _write_stock(stock, rows, 4)
                theirs_s = bench.seconds(
                    partial(_write_stock, stock, rows, tokens), bench.sized(2, 1, 1)
                )
            bench.measured(
                name,
                SAMPLE,
                tokens_per_s=rows * tokens / ours_s,
                of_bandwidth_bound=bound_s / ours_s,
                transformers_tokens_per_s=rows * tokens / theirs_s if theirs_s else None,
            )
            del decoder


def _bandwidth(bench: Bench) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    source = torch.ones(bench.sized(1 << 30, 1 << 25, 1 << 20), device=bench.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.seconds(lambda: target.copy_(source), 5)


def _new_model(shape: ModelSection, bench: Bench) -> ReverseGPT:
    model = ReverseGPT(shape, _VOCAB_SIZE)
    model.initialize(0)
    return model.to(bench.device, torch.bfloat16).eval()


def _stock_model(model: ReverseGPT, context_tokens: int) -> Any:
    """transformers' model with the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weight = model.lm_head.weight
    fields = to_stock(model.shape, _VOCAB_SIZE, context_tokens, "bfloat16")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    stock = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
    stock.load_state_dict(model.state_dict())
    return stock.to(weight.device)


def _write(decoder: Decoder, rows: int, tokens: int) -> None:
    prompts = [Prompt(list(range(_GIVEN_TOKENS)), _ALL_IDS, _CODEC.end_id)] * rows
    samples = sample_many(decoder, _CODEC, prompts, SamplingOptions(tokens))
    assert {len(sample) for sample in samples} == {tokens}


@torch.inference_mode()
def _write_stock(stock: Any, rows: int, tokens: int) -> None:
    given = torch.arange(_GIVEN_TOKENS, device=stock.device).repeat(rows, 1)
    stock.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=True,
        temperature=0.8,
        top_k=200,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
