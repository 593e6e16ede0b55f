"""Durations for display."""


def duration(seconds: float | None) -> str:
    """`3d04h`, `2h15m` or `7m05s`; `-` for None.

    >>> duration(8100)
    '2h15m'
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s"
