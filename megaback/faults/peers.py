"""Peers that a rank watches, so that every rank and every host has a watcher.

On its own host a rank watches the process of the next rank. The first rank of a host also watches
the first rank of the next host, by its heartbeat: a host that is lost with all its ranks, or has
only one, has no one else to notice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megaback.faults.heartbeat import Heartbeat


@dataclass(frozen=True)
class Peers:
    """Ranks whose heartbeats a rank reads."""

    neighbor: int | None = None
    """Next rank on this host, watched by its process."""
    distant: int | None = None
    """First rank of the next host, watched by its heartbeat; None unless this rank is a first."""
    near: tuple[int, ...] = ()
    """Ranks to look at once one is lost: of this host and, for its first rank, of the next host."""


def peers_of(rank: int, hosts: Sequence[str]) -> Peers:
    """Peers of a rank, by the host of every rank."""
    groups: dict[str, list[int]] = {}
    for number, host in enumerate(hosts):
        groups.setdefault(host, []).append(number)
    here = groups[hosts[rank]]
    neighbor = here[(here.index(rank) + 1) % len(here)]
    in_order = list(groups.values())
    following = in_order[(in_order.index(here) + 1) % len(in_order)]
    is_watcher = rank == here[0] and following is not here
    near = [*here, *following] if is_watcher else here
    return Peers(
        neighbor if neighbor != rank else None,
        following[0] if is_watcher else None,
        tuple(other for other in near if other != rank),
    )


class SilenceWatch:
    """Silence of a rank on another host, as far as it means that the rank is lost.

    It is the time during which its heartbeat's content does not change, by this rank's clock: the
    clocks of hosts differ. The time starts again whenever there is another explanation:

    - This rank begins another phase: a step needs every rank, so all are alive, and the other one
      cannot write.
    - This rank cannot write its own heartbeat: the disk is full, or gone.
    - This process was paused, as all may have been.
    """

    def __init__(self, limit_s: float, interval_s: float) -> None:
        self.limit_s, self._interval_s = limit_s, interval_s
        self._seen: tuple[float | None, float] | None = None
        self._since = self._last = 0.0

    def is_lost(
        self, beat: Heartbeat | None, own: Heartbeat, has_written: bool, now: float
    ) -> bool:
        """Whether the rank counts as lost.

        Called at every heartbeat with the one that is seen, if any, this rank's `own`, whether that
        was written, and the time of a monotonic clock.
        """
        seen = (beat.written if beat is not None else None, own.since)
        was_paused = now - self._last > 3 * self._interval_s
        has_ended = beat is not None and beat.exit_reason is not None
        if seen != self._seen or not has_written or was_paused or has_ended:
            self._since = now
        self._seen, self._last = seen, now
        return now - self._since > self.limit_s
