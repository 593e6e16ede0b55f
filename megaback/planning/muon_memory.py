"""Memory of Muon's update: buffers of `optim.muon` and of `optim.zero_matrices`. Loads no torch."""

from collections.abc import Iterable

from megaback.planning.matrix_shares import MatrixShape, MatrixShare


def orthogonal_elements(matrices: Iterable[MatrixShape]) -> float:
    """Elements of the buffers that `optim.muon.orthogonalized` allocates at its peak."""
    counts: dict[MatrixShape, int] = {}
    for rows, columns in matrices:
        key = (min(rows, columns), max(rows, columns))
        counts[key] = counts.get(key, 0) + 1
    peak = results = previous = 0.0
    for (short, long), count in counts.items():
        elements, grams = float(count * short * long), float(count * short * short)
        # A stack, two iterates and two Gram matrices; results and the last iterate of the previous
        # shapes.
        peak = max(peak, 3 * elements + 2 * grams + results + previous)
        results, previous = results + elements, elements
    return peak


def exchange_bytes(share: MatrixShare, ranks: int, size: int) -> float:
    """Bytes that `MatrixShards.apply` allocates at its peak, besides gradient and momentum.

    `size`: bytes per element of the precision in which matrices are orthogonalized.
    """
    held, owned = size * share.held, size * share.owned_elements
    transposed = size * sum(rows * columns for rows, columns in share.owned if rows > columns)
    sent = 0 if size == 4 else held  # a copy in lower precision
    whole = sent + owned
    if ranks == 1:  # nothing is sent, and the parts are the copies
        gathering, joined, returned = 0, 0, 0
    else:
        # Both exchanges join the parts that are sent; those that arrive are kept.
        whole += owned
        gathering, joined, returned = sent + held + owned, owned, held
    done = whole + owned + transposed + returned
    return max(
        gathering,
        whole + size * orthogonal_elements(share.owned),
        done + joined,
        done + 4 * share.held,  # this rank's part of the results
    )
