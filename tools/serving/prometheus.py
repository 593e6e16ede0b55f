"""Metrics in Prometheus' format, without any text of requests."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """One registry per server, so that two in a process do not share it."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "megaback_requests", "Requests answered.", ["path", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "megaback_request_seconds",
            "From a request's arrival to the last byte of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token_seconds = Histogram(
            "megaback_first_token_seconds",
            "From a request's arrival to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._open = Gauge("megaback_requests_open", "Requests being answered.", registry=registry)
        self._prompt_tokens = Counter(
            "megaback_prompt_tokens", "Tokens of prompts read.", ["model"], registry=registry
        )
        self._written_tokens = Counter(
            "megaback_written_tokens", "Tokens written.", ["model"], registry=registry
        )
        self._step_seconds = Histogram(
            "megaback_step_seconds",
            "Time of a step, which writes a token of every running sample.",
            ["model"],
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self._running = Gauge(
            "megaback_samples_running", "Samples being written.", ["model"], registry=registry
        )
        self._waiting = Gauge(
            "megaback_samples_waiting", "Samples without a place.", ["model"], registry=registry
        )
        self._given_up = Counter(
            "megaback_requests_given_up",
            "Requests whose client hung up before the answer was complete.",
            registry=registry,
        )

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def opened(self) -> None:
        self._open.inc()

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._open.dec()
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def hung_up(self) -> None:
        self._given_up.inc()

    def first_token(self, model: str, seconds: float) -> None:
        self._first_token_seconds.labels(model).observe(seconds)

    def rows(self, model: str, *, running: int, waiting: int) -> None:
        self._running.labels(model).set(running)
        self._waiting.labels(model).set(waiting)

    def began(self, model: str, prompt_tokens: int) -> None:
        self._prompt_tokens.labels(model).inc(prompt_tokens)

    def wrote(self, model: str, tokens: int) -> None:
        self._written_tokens.labels(model).inc(tokens)

    @contextmanager
    def stepping(self, model: str) -> Iterator[None]:
        with self._step_seconds.labels(model).time():
            yield
