"""Streams of the fake GPU: the order of its work, without running any of it concurrently.

Work on one stream that needs a result of another must have waited for it.
"""

from typing import Any


class FakeEvent:
    """A moment of a stream."""

    def __init__(self, device: "FakeDeviceStreams", stream: "FakeStream") -> None:
        self._device = device
        self.stream, self.moment, self.seen = stream, stream.moment, dict(stream.seen)

    def query(self) -> bool:
        """Whether the host knows that this moment has passed."""
        return self._device.host.seen.get(self.stream, 0) >= self.moment

    def synchronize(self) -> None:
        if self._device.host.seen.get(self.stream, 0) < self.moment:
            self._device.host_waits(self, "synchronize")


class FakeStream:
    """A queue of work; `seen` has the moments of other streams that its next work comes after."""

    def __init__(self, device: "FakeDeviceStreams") -> None:
        self._device = device
        self.moment = 0
        self.seen: dict[FakeStream, int] = {}

    def record_event(self) -> FakeEvent:
        return FakeEvent(self._device, self)

    def wait_event(self, event: FakeEvent) -> None:
        for stream, moment in (event.seen | {event.stream: event.moment}).items():
            self.seen[stream] = max(self.seen.get(stream, 0), moment)

    def __enter__(self) -> "FakeStream":
        self._device.entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._device.entered.pop()


class FakeDeviceStreams:
    """The streams of a device, and when its memory was written."""

    def __init__(self, on_wait: Any) -> None:
        """`on_wait` is called with the name of what the host waits in."""
        self._on_wait = on_wait
        self.host = FakeStream(self)
        self.entered = [FakeStream(self)]
        self._written: dict[int, tuple[FakeStream, int]] = {}
        self._users: dict[int, set[FakeStream]] = {}

    @property
    def current(self) -> FakeStream:
        return self.entered[-1]

    def new_stream(self, _device: object = None) -> FakeStream:
        return FakeStream(self)

    def current_stream(self, _device: object = None) -> FakeStream:
        return self.current

    def host_waits(self, event: FakeEvent, what: str) -> None:
        self.host.wait_event(event)
        self._on_wait(what)

    def read(self, memory: int) -> None:
        """Raises RuntimeError unless the current stream comes after the last write."""
        stream, moment = self._written.get(memory, (self.current, 0))
        if stream is not self.current and self.current.seen.get(stream, 0) < moment:
            raise RuntimeError("a tensor is used on a stream that has not waited for its writing")
        if self.current not in self._users.get(memory, {self.current}):
            raise RuntimeError("a tensor is used on a stream without `record_stream`")

    def keep(self, memory: int, stream: FakeStream) -> None:
        """Reuse memory only after a stream that did not allocate it."""
        self._users[memory].add(stream)

    def write(self, memory: int, *, is_new: bool) -> None:
        if not memory:  # of an empty tensor
            return
        if is_new:
            self._users[memory] = {self.current}
        self.current.moment += 1
        self._written[memory] = self.current, self.current.moment
