"""A tiny decoder and its samples, for tests of decoding."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from data_pipeline.text.codec import Prompt
from megaback.inference.decoder import Decoder
from megaback.inference.generate import sample_many
from megaback.inference.sampling import SamplingOptions, choose, fetched
from tests.helpers.small_models import VOCAB_SIZE, make_model

CONTEXT_TOKENS = 24
END_ID = 1
STOP_ID = 2
WRITABLE = np.arange(1, VOCAB_SIZE - 5)


class Codec:
    """The part of a codec that decoding needs."""

    end_id = END_ID
    vocab_size = VOCAB_SIZE

    def newest(self, ids: list[int], num_tokens: int) -> list[int]:
        return ids[max(len(ids) - num_tokens, 0) :]

    def writable_ids(self, end_id: int) -> np.ndarray:
        assert end_id == END_ID
        return WRITABLE


CODEC = Codec()


def prompt_of(ids: Sequence[int], first_ids: np.ndarray = WRITABLE) -> Prompt:
    return Prompt(list(ids), first_ids, END_ID)


@cache
def decoder(**changes: object) -> Decoder:
    return Decoder(make_model(**changes), CONTEXT_TOKENS)


def written(
    prompts: Sequence[Sequence[int]], options: SamplingOptions, by: Decoder | None = None
) -> list[list[int]]:
    """The new ids of each sample."""
    return sample_many(by or decoder(), CODEC, [prompt_of(ids) for ids in prompts], options)


def chosen(
    logits_BV: Tensor, options: SamplingOptions, streams: Sequence[np.random.Generator]
) -> list[int]:
    """An id for each row, with the next number of its own stream."""
    draws = [stream.random(dtype=np.float32) for stream in streams]
    return fetched(choose(logits_BV, options, torch.tensor(draws, dtype=torch.float64)))
