"""Samples of a request while they are written."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.text.codec import TextCodec
from megaback.inference.batch import Sample
from megaback.inference.sampling import SamplingOptions
from tests.helpers.server import tiny_models
from tools.serving.deadline import Deadline
from tools.serving.models import ServedModel
from tools.serving.prometheus import Metrics
from tools.serving.request_samples import Job
from tools.serving.worker import Engine

NUM_TOKENS = 30


async def turns_at_each_step(model: ServedModel) -> list[int]:
    """Turns of the event loop until each step, with all of the first steps there at once."""
    loop, num_turns, turns = asyncio.get_running_loop(), 0, []

    def count() -> None:
        nonlocal num_turns
        num_turns += 1
        loop.call_soon(count)

    engine, deadline = Engine({"tiny": model.batch}, 1, Metrics()), Deadline(60)
    engine.start()
    options = SamplingOptions(max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, seed=1)
    sample = Sample(model.codec.prompt("it."), options)
    try:
        with Job(engine, Metrics(), "tiny", [sample], deadline) as job:
            while sample.num_new < NUM_TOKENS:
                time.sleep(0.01)  # the loop stands still, and its callbacks accumulate
            loop.call_soon(count)
            async for _ in job.steps():
                turns.append(num_turns)
    finally:
        deadline.close()
        await loop.run_in_executor(None, engine.close)
    return turns


def test_the_loop_turns_between_two_steps_so_that_a_disconnect_is_noticed(
    tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    turns = asyncio.run(turns_at_each_step(tiny_models(tmp_path, codec)["tiny"]))
    assert len(turns) == NUM_TOKENS
    assert all(after > before for before, after in itertools.pairwise(turns))
