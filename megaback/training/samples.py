"""Texts that the model continues at a validation, with its weights of that moment.

All ranks compute the same passes, so that none waits for another, and the engine gathers weights at
ZeRO stage 3. Ids are chosen on the CPU, with numbers that depend on seed, step and sample alone. No
random state of PyTorch or NumPy is used.

Shapes: T packed tokens, B samples of a pass, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.text.codec import Prompt, TextCodec
from megaback.inference.sampling import SamplingOptions, choose
from megaback.model.attention import Segments
from megaback.model.sending import sent


@torch.no_grad()
def write_samples(
    engine: Any,
    prompts: Sequence[Prompt],
    codec: TextCodec,
    options: SamplingOptions,
    step: int,
    rows: int,
    device: torch.device,
    on_pass: Callable[[], None],
    *,
    is_compiled: bool = False,
) -> list[list[int]]:
    """New ids of each prompt, without its end marker; they end where logits are non-finite.

    `options.seed` and `step` seed the choices. `rows`: maximum number of samples per forward pass.
    `on_pass` is called before each. `is_compiled`: as in `evaluate`. Each rank runs the same number
    of passes, also if the devices round differently.
    """
    engine.eval()
    samples: list[list[int]] = []
    for first in range(0, len(prompts), rows):
        group = [
            _Growing(prompt, codec, options, (options.seed, step, first + number))
            for number, prompt in enumerate(prompts[first : first + rows])
        ]
        for _ in range(options.max_new_tokens):
            on_pass()
            with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
                logits_BV = engine(*_inputs([one.ids for one in group], device))
            for one, logits_V in zip(group, logits_BV.float().cpu(), strict=True):
                one.grow(logits_V)
        samples += [one.new_ids for one in group]
    engine.train()
    return samples


class _Growing:
    """A prompt and the ids that are written after it."""

    def __init__(
        self, prompt: Prompt, codec: TextCodec, options: SamplingOptions, seeds: tuple[int, ...]
    ) -> None:
        self.ids = list(prompt.ids)
        self.new_ids: list[int] = []
        self._end_id, self._options = prompt.end_id, options
        self._allowed = self._allowed_ids(prompt, codec)
        # Draws of 24 bits, as `choose` needs them.
        draws = np.random.default_rng(seeds).random(options.max_new_tokens, dtype=np.float32)
        self._draws = iter(draws.tolist())
        self._has_ended = False

    def grow(self, logits_V: Tensor) -> None:
        """Choose the next id, unless the sample has ended."""
        if self._has_ended:
            return
        allowed_A = torch.from_numpy(next(self._allowed))
        masked_V = torch.full_like(logits_V, -torch.inf)
        masked_V[allowed_A] = logits_V[allowed_A]
        draws_1 = torch.tensor([next(self._draws)], dtype=torch.float64)
        new_id = int(choose(masked_V[None], self._options, draws_1))
        self._has_ended = new_id in (-1, self._end_id)
        if not self._has_ended:
            self.ids.append(new_id)
            self.new_ids.append(new_id)

    @staticmethod
    def _allowed_ids(prompt: Prompt, codec: TextCodec) -> Iterator[np.ndarray[Any, Any]]:
        yield prompt.first_ids
        while True:
            yield codec.writable_ids(prompt.end_id)


def _inputs(rows: list[list[int]], device: torch.device) -> tuple[Tensor, None, Tensor, Segments]:
    """Arguments of the model's forward pass for the logits after each row."""
    lengths = tuple(map(len, rows))
    ids_T = sent(torch.tensor([one for row in rows for one in row]), device)
    positions_T = sent(torch.cat([torch.arange(length) for length in lengths]), device)
    return ids_T, None, positions_T, Segments.from_lengths(lengths, device)
