"""Engine thread: fairness between requests, cancellation and errors."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from data_pipeline.text.codec import TextCodec
from megaback.inference.batch import ReadingError, Sample
from megaback.inference.sampling import SamplingOptions
from megaback.inference.steps import Steps
from tests.helpers.server import tiny_models, wait_until
from tools.serving.models import ServedModel
from tools.serving.prometheus import Metrics
from tools.serving.worker import Engine, EngineFullError, Writing

Codecs = Callable[..., TextCodec]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec, num_slots=2)


@contextmanager
def running(models: dict[str, ServedModel], max_waiting: int = 100) -> Iterator[Engine]:
    """An engine that delivers events to an event loop of its own."""
    engine = Engine({name: one.batch for name, one in models.items()}, max_waiting, Metrics())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        loop.call_soon_threadsafe(engine.start)
        yield engine
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        engine.close()
        loop.close()
        assert [len(model.batch) for model in models.values()] == [0, 0]


class Work:
    """Work of many steps, which records the time of each and whether it was ended."""

    def __init__(self, num_steps: int, step_s: float = 0.0) -> None:
        self.times: list[float] = []
        self.is_ended = threading.Event()
        self._num_steps, self._step_s = num_steps, step_s

    def steps(self) -> Steps[int]:
        try:
            for _ in range(self._num_steps):
                self.times.append(time.monotonic())
                time.sleep(self._step_s)
                yield
            return self._num_steps
        finally:
            self.is_ended.set()


def writings_of(
    model: ServedModel, count: int, tokens: int, ended: list[tuple[str, float]], label: str
) -> list[Writing]:
    """`count` samples of `tokens` tokens; the end of each is appended to `ended` with its time."""

    def put(event: object) -> None:
        if isinstance(event, Exception) or event.is_last:  # type: ignore[attr-defined]
            ended.append((label, time.monotonic()))

    options = SamplingOptions(tokens, min_new_tokens=tokens)
    prompt = model.codec.prompt("the last map.")
    return [Writing(model.name, Sample(prompt, options), put) for _ in range(count)]


def test_samples_are_written_during_long_work(
    models: dict[str, ServedModel],
) -> None:
    ended: list[tuple[str, float]] = []
    with running(models) as engine:
        work = Work(1000, step_s=0.02)
        future = engine.compute(work.steps())
        wait_until(lambda: len(work.times) > 0)
        engine.write(writings_of(models["tiny"], 2, 10, ended, "sample"))
        wait_until(lambda: len(ended) == 2)
        assert not future.done()
        # The work has a slice between each two of the 10 tokens; it would take 20 s in all.
        assert len(work.times) < 500
        future.cancel()


def test_canceled_work_ends_at_its_next_step(models: dict[str, ServedModel]) -> None:
    with running(models) as engine:
        work, other = Work(1000, step_s=0.01), Work(3)
        future = engine.compute(work.steps())
        wait_until(lambda: len(work.times) > 3)
        future.cancel()
        assert work.is_ended.wait(10)
        assert len(work.times) < 1000
        assert engine.compute(other.steps()).result(10) == 3


def test_closing_the_engine_ends_samples_and_work(models: dict[str, ServedModel]) -> None:
    work = Work(100_000)
    with running(models) as engine:
        engine.write(writings_of(models["tiny"], 3, 4000, [], "sample"))
        future = engine.compute(work.steps())
        wait_until(lambda: len(work.times) > 0 and len(models["tiny"].batch) == 2)
    assert work.is_ended.is_set()
    assert future.cancelled()


def test_work_takes_turns_and_a_failure_reaches_its_future(
    models: dict[str, ServedModel],
) -> None:
    def failing() -> Steps[None]:
        yield
        raise ValueError("no such thing")

    with running(models) as engine:
        first, second = Work(200, step_s=0.005), Work(5)
        slow, quick = engine.compute(first.steps()), engine.compute(second.steps())
        broken = engine.compute(failing())
        assert quick.result(10) == 5
        with pytest.raises(ValueError, match="no such thing"):
            broken.result(10)
        assert not slow.done()
        slow.cancel()


def test_waiting_requests_take_turns(models: dict[str, ServedModel]) -> None:
    ended: list[tuple[str, float]] = []
    is_held, may_continue = threading.Event(), threading.Event()

    def held() -> Steps[None]:
        is_held.set()
        may_continue.wait(60)
        yield

    with running(models, max_waiting=14) as engine:
        engine.compute(held())
        assert is_held.wait(10)
        engine.write(writings_of(models["tiny"], 12, 8, ended, "many"))
        engine.write([])
        engine.write(writings_of(models["tiny"], 2, 8, ended, "few"))
        with pytest.raises(EngineFullError, match="14 samples are waiting already"):
            engine.write(writings_of(models["ahead"], 1, 8, ended, "more"))
        may_continue.set()
        wait_until(lambda: len(ended) == 14)
    # Two slots, one per request.
    assert [label for label, _ in ended].count("few") == 2
    assert (
        {label for label, _ in ended[:2]} == {label for label, _ in ended[2:4]} == {"many", "few"}
    )


def test_an_error_in_reading_a_prompt_reaches_its_request_only(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["tiny"]
    original = model.decoder.read_steps

    def read_steps(ids: list[int]) -> object:
        if ids != model.codec.prompt("the last map.").ids[:-1]:
            raise RuntimeError("no memory")
        return original(ids)

    monkeypatch.setattr(model.decoder, "read_steps", read_steps)
    events: list[object] = []
    ended: list[tuple[str, float]] = []
    bad = Sample(model.codec.prompt("a wooden clock."), SamplingOptions(3))
    with running(models) as engine:
        engine.write([Writing("tiny", bad, events.append)])
        engine.write(writings_of(model, 1, 5, ended, "good"))
        wait_until(lambda: bool(ended and events))
    assert [type(event) for event in events] == [ReadingError]


def test_after_an_error_in_the_thread_open_samples_fail_and_new_ones_are_written(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, float]] = []

    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    with running(models) as engine:
        writings = writings_of(models["tiny"], 1, 4000, ended, "given up")
        engine.write(writings)
        engine.write(writings_of(models["ahead"], 1, 4000, ended, "beside it"))
        wait_until(lambda: all(model.batch.num_rows for model in models.values()))
        with monkeypatch.context() as patch:
            patch.setattr(models["tiny"].batch, "remove", broken)
            engine.give_up(writings)
            wait_until(lambda: [label for label, _ in ended] == ["beside it"])
        engine.write(writings_of(models["tiny"], 1, 3, ended, "next"))
        wait_until(lambda: ended[-1][0] == "next")
        assert engine.is_alive
