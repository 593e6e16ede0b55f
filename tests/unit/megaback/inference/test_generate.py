"""Generated ids are the same with and without a cache, alone and in a batch."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, PromptError
from megaback.inference.decoder import Decoder
from megaback.inference.generate import generate
from megaback.inference.sampling import SamplingOptions, penalized
from megaback.inference.steps import finish
from megaback.model.gpt import ReverseGPT
from tests.helpers.decoding import (
    CODEC,
    CONTEXT_TOKENS,
    END_ID,
    STOP_ID,
    WRITABLE,
    chosen,
    decoder,
    prompt_of,
    written,
)
from tests.helpers.small_models import VOCAB_SIZE, make_model, packed


@torch.no_grad()
def written_without_a_cache(
    model: ReverseGPT, ids: Sequence[int], options: SamplingOptions
) -> list[int]:
    """One sample without a cache: everything is read again for each token."""
    draws = np.random.default_rng(options.seed)
    ends, later = {END_ID, *options.stop_ids}, {*WRITABLE.tolist(), *options.stop_ids}
    window, new_ids = list(ids), []
    while len(new_ids) < options.max_new_tokens:
        if len(window) > CONTEXT_TOKENS:
            window = window[-(CONTEXT_TOKENS // 2) :]
        logits_1V = model.logits(torch.tensor(window), *packed(len(window)))[-1:]
        seen_1V = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
        seen_1V[0, [*ids, *new_ids]] = True
        logits_1V = penalized(logits_1V, seen_1V, options.repetition_penalty)
        allowed = later if new_ids else set(WRITABLE.tolist())
        allowed = allowed - ends if len(new_ids) < options.min_new_tokens else allowed
        logits_1V[0, sorted(set(range(VOCAB_SIZE)) - allowed)] = -torch.inf
        (new_id,) = chosen(logits_1V, options, [draws])
        if new_id in ends:
            break
        window.append(new_id)
        new_ids.append(new_id)
    return new_ids


SHAPES = [
    {},
    {"num_kv_heads": None, "qk_norm": False},
    {"num_kv_heads": 1, "tie_embeddings": True},
]


@pytest.mark.parametrize(
    "way", [{}, {"usual_rows": 16}, {"takes_over": False}], ids=["one row", "many", "borrowed"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=["gqa", "llama", "tied"])
def test_single_steps_give_the_logits_of_a_whole_prefill(
    shape: dict[str, object], way: dict[str, bool]
) -> None:
    ids_T = torch.randint(0, VOCAB_SIZE, (20,), generator=torch.manual_seed(0))
    with torch.no_grad():
        expected_TV = make_model(**shape).logits(ids_T, *packed(20))
    reader = Decoder(make_model(**shape), CONTEXT_TOKENS, **way)
    cache = reader.new_cache(1)
    cache.add(finish(reader.read_steps(ids_T[:7].tolist())))

    logits_TV = torch.cat([reader.step(id_1, cache) for id_1 in ids_T[7:].split(1)])

    torch.testing.assert_close(logits_TV, expected_TV[7:], atol=1e-5, rtol=1e-5)


@settings(max_examples=25)
@given(
    prompts=st.lists(
        st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=24), min_size=1, max_size=4
    ),
    options=st.builds(
        SamplingOptions,
        max_new_tokens=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 0.0, 1.0, 1.5]),
        top_k=st.sampled_from([0, 5]),
        seed=st.integers(0, 99),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        stop_ids=st.sampled_from([(), (STOP_ID,), (VOCAB_SIZE - 1,)]),
        min_new_tokens=st.sampled_from([0, 1, 3, 40]),
    ),
)
def test_samples_are_those_without_a_cache_also_past_the_context(
    prompts: list[list[int]], options: SamplingOptions
) -> None:
    assert written(prompts, options) == [
        written_without_a_cache(make_model(), ids, replace(options, seed=options.seed + at))
        for at, ids in enumerate(prompts)
    ]


@settings(max_examples=12)
@given(
    prompts=st.lists(
        st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=24), min_size=2, max_size=5
    ),
    seed=st.integers(0, 1000),
    how=st.sampled_from(
        [
            {"temperature": 0},
            {"temperature": 0, "repetition_penalty": 1.5},
            {"top_k": 0},
            {"top_k": 5},
            {"top_p": 0.7},
            {"min_p": 0.1, "temperature": 1.5, "repetition_penalty": 1.2, "stop_ids": (STOP_ID,)},
        ]
    ),
)
def test_a_sample_in_a_batch_is_the_same_as_alone(
    prompts: list[list[int]], seed: int, how: dict[str, object]
) -> None:
    together = written(prompts, SamplingOptions(max_new_tokens=40, seed=seed, **how))

    alone = [
        written([ids], SamplingOptions(max_new_tokens=40, seed=seed + at, **how))[0]
        for at, ids in enumerate(prompts)
    ]
    assert together == alone


def test_each_sample_ends_at_its_own_end_marker_or_stop_id() -> None:
    prompts = [[5 + number] for number in range(40)]
    free = written(prompts, SamplingOptions(60, seed=7, temperature=1.5, top_k=0))
    stopped = written(
        prompts, SamplingOptions(60, seed=7, temperature=1.5, top_k=0, stop_ids=(STOP_ID,))
    )

    lengths = {len(ids) for ids in free}
    assert len(lengths) > 5  # some have an end marker, at different positions
    assert all(END_ID not in ids for ids in free)
    for ids, ids_before_stop in zip(free, stopped, strict=True):
        until = ids.index(STOP_ID) if STOP_ID in ids else len(ids)
        assert ids_before_stop == ids[:until]
    assert free != stopped


def test_stop_ids_can_be_generated_although_no_text_contains_them() -> None:
    beyond = int(WRITABLE[-1]) + 1
    prompts = [[5 + number] for number in range(60)]
    hot = {"temperature": 3.0, "top_k": 0, "seed": 1}

    free = written(prompts, SamplingOptions(30, **hot))
    stopped = written(prompts, SamplingOptions(30, stop_ids=(beyond,), **hot))

    assert all(beyond not in ids for ids in free + stopped)
    assert sum(map(len, stopped)) < sum(map(len, free))


@pytest.mark.parametrize("stop_id", [-1, VOCAB_SIZE])
def test_stop_ids_that_do_not_exist_are_refused(stop_id: int) -> None:
    with pytest.raises(ConfigError, match=f"`stop_ids` has {stop_id}, and the model has"):
        written([[5]], SamplingOptions(stop_ids=(stop_id,)))


def test_the_first_new_id_is_one_that_the_prompt_allows() -> None:
    prompt = prompt_of([5, 6], np.array([9]))

    ids = list(generate(decoder(), CODEC, prompt, CONTEXT_TOKENS, SamplingOptions(5, seed=3)))

    assert ids[0] == 9
    assert ids[1:] != [9, 9, 9, 9]


def test_a_model_generates_as_a_decoder_does_and_is_not_changed() -> None:
    model, options = make_model(), SamplingOptions(30, seed=2)

    twice = [
        list(generate(model, CODEC, prompt_of([5, 6]), CONTEXT_TOKENS, options)) for _ in range(2)
    ]

    assert twice == [written([[5, 6]], options)[0]] * 2


def test_a_longer_sample_begins_with_the_shorter_one() -> None:
    few, many = (written([[5]], SamplingOptions(count, seed=4))[0] for count in (10, 40))

    assert many[:10] == few


def test_a_prompt_beyond_the_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(PromptError, match=r"25 tokens.* 24"):
        written([[5], [5] * 25], SamplingOptions())


def test_without_prompts_there_are_no_samples() -> None:
    assert written([], SamplingOptions()) == []


def test_a_compiled_decoder_generates_as_an_eager_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph is captured but run eagerly: generating its kernels takes a minute here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = Decoder(make_model(num_layers=1), CONTEXT_TOKENS, compiled=True)
    prompts, options = [[5, 6, 7], [8]], SamplingOptions(8, seed=11)

    samples = written(prompts, options, compiled)

    assert samples == written(prompts, options, decoder(num_layers=1))
    assert all(len(ids) == 8 for ids in samples)  # so that one batch size was compiled


def test_bf16_gives_the_logits_of_the_model_in_bf16_to_its_precision() -> None:
    ids_T = torch.randint(0, VOCAB_SIZE, (20,), generator=torch.manual_seed(0))
    model = make_model().bfloat16()
    with torch.no_grad():
        expected_TV = model.logits(ids_T, *packed(20)).float()
    reader = Decoder(model, CONTEXT_TOKENS)
    cache = reader.new_cache(1)
    cache.add(finish(reader.read_steps([])))

    logits_TV = torch.cat([reader.step(id_1, cache) for id_1 in ids_T.split(1)])

    assert (logits_TV - expected_TV).abs().mean() < 0.02 * expected_TV.std()
