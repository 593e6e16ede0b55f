"""torch.compile: one graph of the whole model with `varlen`, and a count of its graphs."""

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.errors import BackendError
from data_pipeline.loading.rows import Batch
from megaback.config import TrainingSection
from megaback.model.attention import AttentionBackend, Segments, sdpa_attention
from megaback.model.attention_choice import Attention
from megaback.model.compiler import GraphCounter, why_not_compiled
from megaback.model.gpt import ReverseGPT
from megaback.training.validation import to_device
from tests.helpers.small_models import CPU, VOCAB_SIZE, random_ids, section
from tests.helpers.varlen_on_cpu import varlen_on_cpu

CONTEXT_TOKENS = 16
BATCHES = ((5, 11, 16), (16, 16), (1,) * 14 + (2, 16), (3, 3, 10, 9, 7))
"""Lengths of the documents in two rows."""
SDPA = Attention("sdpa", sdpa_attention)
VARLEN = Attention("varlen", sdpa_attention, is_traceable=True)


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    torch._dynamo.reset()


def inputs_of(
    lengths: tuple[int, ...], context_tokens: int | None = CONTEXT_TOKENS
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    batch = Batch(
        ids_T=random_ids(sum(lengths)).numpy(),
        targets_T=random_ids(sum(lengths), seed=1).numpy(),
        cu_seqlens=np.cumsum((0, *lengths), dtype=np.int32),
        num_targets=sum(lengths),
        num_skipped_rows=0,
    )
    return to_device(batch, CPU, context_tokens, is_compiled=True)


def model_of(backend: AttentionBackend, checkpointing: str) -> ReverseGPT:
    model = ReverseGPT(section(num_layers=1), VOCAB_SIZE, backend, checkpointing)
    model.initialize(1)
    return model.train()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_one_graph_of_the_whole_model_serves_all_batches(checkpointing: str) -> None:
    compiler = GraphCounter("aot_eager" if checkpointing == "block" else "eager")
    plain = model_of(sdpa_attention, "none")
    model = model_of(varlen_on_cpu(), checkpointing)
    model.compile(backend=compiler, fullgraph=True)
    for lengths in BATCHES:
        losses = []
        for one in (plain, model):
            one.zero_grad()
            losses.append(one(*inputs_of(lengths)))
            losses[-1].mean().backward()

        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        gradients = [[w.grad for w in one.parameters()] for one in (model, plain)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert compiler.num_graphs == 1


def test_a_number_that_varies_is_compiled_again_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = GraphCounter("eager")
    model = model_of(varlen_on_cpu(), "none")
    model.compile(backend=compiler, fullgraph=True)
    with caplog.at_level(logging.WARNING):
        for lengths, context_tokens in ((BATCHES[0], CONTEXT_TOKENS), (BATCHES[1], 17)):
            before = compiler.num_graphs
            model(*inputs_of(lengths, context_tokens))
            compiler.report_growth(before, "step 7")

    assert compiler.num_graphs == 2
    assert "step 7 compiled the model again" in caplog.text


def test_neither_the_first_graphs_nor_none_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    compiler = GraphCounter()
    with caplog.at_level(logging.WARNING):
        for before, now in ((0, 1), (1, 1)):
            compiler.num_graphs = now
            compiler.report_growth(before, "step 7")

    assert not caplog.messages


def training(compile_: str, checkpointing: str = "none") -> TrainingSection:
    return TrainingSection.model_validate(
        {"steps": 1, "compile": compile_, "activation_checkpointing": checkpointing}
    )


@pytest.mark.parametrize(
    ("requested", "device", "is_compiled"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("on", "cpu", True),
        ("off", "cuda", False),
    ],
)
def test_auto_compiles_on_gpus_only(requested: str, device: str, is_compiled: bool) -> None:
    reason = why_not_compiled(training(requested), 1, device, VARLEN)

    assert (reason is None) == is_compiled


@pytest.mark.parametrize(
    ("stage", "checkpointing", "attention", "text"),
    [
        (3, "none", VARLEN, "zero.stage=3 gathers the weights"),
        (2, "block", SDPA, "block recomputes whole blocks, with attention by sdpa"),
    ],
)
def test_what_cannot_be_compiled_is_refused_on_request_and_left_by_auto(
    stage: int, checkpointing: str, attention: Attention, text: str
) -> None:
    reason = why_not_compiled(training("auto", checkpointing), stage, "cuda", attention)
    assert reason is not None
    assert text in reason
    with pytest.raises(BackendError, match=rf"training\.compile is on, but .*{text}.* to auto"):
        why_not_compiled(training("on", checkpointing), stage, "cuda", attention)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_varlen_is_compiled_with_every_kind_of_checkpointing(stage: int) -> None:
    for checkpointing in ("none", "selective", "block"):
        section = training("auto", checkpointing)
        assert why_not_compiled(section, stage, "cuda", VARLEN) is None
