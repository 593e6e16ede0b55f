"""Log-likelihoods by a server, as `megaback.inference.device_pool` computes them here."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

from megaback.client.daemon_pool import DaemonPool
from megaback.client.servers import ModelServer
from megaback.inference.likelihood import Continuation, Likelihood

_PROMPTS_AT_ONCE = 64
_TOKENS_AT_ONCE = 8192
_REQUESTS_AT_ONCE = 2


class RemotePool:
    """The model of a server, asked by a few threads. Close it."""

    def __init__(self, server: ModelServer) -> None:
        """Raises BackendError if the server gives no probabilities of a prompt's ids."""
        server.require_scores()
        self._server = server
        self._threads = DaemonPool(_REQUESTS_AT_ONCE)

    @property
    def dtype_name(self) -> str:
        return self._server.dtype

    def submit(self, continuations: Sequence[Continuation]) -> "Future[list[float]]":
        """Start asking for log P(written | given) of each."""
        return self._threads.submit(self._log_probabilities, continuations)

    def result(self, future: "Future[list[float]]") -> list[float]:
        """The results, once they are here. Raises ServeError."""
        return future.result()

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """log P of each, and whether it is greedy. Raises ServeError."""
        batches = [
            self._threads.submit(self._server.likelihoods, batch)
            for batch in _batches(continuations)
        ]
        return [one for batch in batches for one in batch.result()]

    def close(self) -> None:
        self._threads.close()

    def _log_probabilities(self, continuations: Sequence[Continuation]) -> list[float]:
        found = [self._server.likelihoods(batch) for batch in _batches(continuations)]
        return [one.log_probability for batch in found for one in batch]


def _batches(continuations: Sequence[Continuation]) -> Iterator[list[Continuation]]:
    batch: list[Continuation] = []
    tokens = 0
    for one in continuations:
        tokens += len(one.given) + len(one.written)
        if batch and (len(batch) == _PROMPTS_AT_ONCE or tokens > _TOKENS_AT_ONCE):
            yield batch
            batch, tokens = [], len(one.given) + len(one.written)
        batch.append(one)
    if batch:
        yield batch
