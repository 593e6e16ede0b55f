"""Rows of a model of both directions: which of them are read forward, and their markers.

Every attention segment begins with the marker at the end of the text that it is read from: a
backward one with the begin marker and a forward one with the end marker, which are exchanged for
forward rows. A row that begins within a document has the marker in place of its first id, without a
target: no document is learned to begin there.
"""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

IGNORED_TARGET = -100
_BITS = 32
_GOLDEN_RATIO = 0x9E3779B9
"""Fraction of 2**32 whose multiples are evenly spread, however many there are."""


def are_forward(step: Indices, position: Indices, share: float) -> Flags:
    """Whether each row is read forward, by its step and its position in the batch.

    Of consecutive positions the share is exact within one row, and each position of the batch, and
    with it each lane, has the share over the steps.
    """
    part = np.uint64(round(share * (1 << _BITS)))
    start = step.astype(np.uint64) * np.uint64(_GOLDEN_RATIO)
    turned = start + position.astype(np.uint64) * part  # modulo 2**64, and so modulo 2**32
    flags: Flags = (turned & np.uint64((1 << _BITS) - 1)) < part
    return flags


def exchange(ids: npt.NDArray[np.integer], begin_id: int, end_id: int) -> None:
    """Exchange begin and end markers in place."""
    begins, ends = ids == begin_id, ids == end_id
    ids[begins], ids[ends] = end_id, begin_id


def mark_directions(
    ids_NC: Indices,
    targets_NC: Indices,
    num_targets_N: Indices,
    is_forward_N: Flags,
    begin_id: int,
    end_id: int,
) -> None:
    """Let packed rows begin with the marker of their direction, and exchange markers of forward
    ones, in place."""
    is_cut_N = ids_NC[:, 0] != begin_id
    num_targets_N -= is_cut_N & (targets_NC[:, 0] != IGNORED_TARGET)
    ids_NC[is_cut_N, 0] = begin_id
    targets_NC[is_cut_N, 0] = IGNORED_TARGET
    for rows_NC in (ids_NC, targets_NC):
        forward_MC = rows_NC[is_forward_N]
        exchange(forward_MC, begin_id, end_id)
        rows_NC[is_forward_N] = forward_MC
