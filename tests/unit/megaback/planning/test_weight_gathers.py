"""Gathers of ZeRO 3 by the sizes of the weights."""

import pytest

from megaback.config import ModelSection
from megaback.planning import weight_gathers as module
from megaback.planning.memory import bucket_elements
from megaback.planning.parameters import Parameters
from megaback.planning.weight_gathers import persistent, weight_gathers

SMALL = ModelSection(num_layers=2, width=512, num_heads=4), 600
LARGE = ModelSection(num_layers=32, width=4096, num_heads=32), 32_000
"""6.7 billion weights, of which a billion stay gathered."""


def test_weights_up_to_100000_are_always_gathered() -> None:
    tiny = ModelSection(num_layers=2, width=32, num_heads=4), 600

    found = weight_gathers(*tiny, 1_000_000, is_first=True, recomputes=False)

    assert (found.whole, found.again) == (0, 0)
    parameters = Parameters.of(*tiny)
    assert persistent(parameters) == parameters.in_order


def test_a_small_model_is_gathered_once_in_buckets() -> None:
    """The embedding, and after it buckets that the weight that fills them ends."""
    for recomputes in (False, True):
        found = weight_gathers(*SMALL, 1_000_000, is_first=True, recomputes=recomputes)
        assert (found.whole, found.again) == (6, 0)
    later = weight_gathers(*SMALL, 1_000_000, is_first=False, recomputes=False)
    assert (later.whole, later.again) == (0, 6)


def test_a_large_bucket_needs_fewer_calls() -> None:
    found = weight_gathers(*SMALL, 10_000_000, is_first=True, recomputes=False)

    assert found.whole == 1


def test_weights_of_a_large_model_are_gathered_again_for_the_backward_pass() -> None:
    found = weight_gathers(*LARGE, 500_000_000, is_first=True, recomputes=False)

    buckets = sum(one.elements for one in Parameters.of(*LARGE).in_order) / 500_000_000
    assert buckets * 0.9 < found.whole < 40 * buckets
    assert 0 < found.again <= 2 * found.whole


@pytest.mark.parametrize(
    ("max_gathered", "max_reuse", "recomputes", "counted"),
    [
        (8_000_000, 8_000_000, False, (22, 62)),
        (6_000_000, 9_000_000, True, (28, 26)),
    ],
)
def test_weights_that_do_not_stay_gathered_are_gathered_as_deepspeed_does(
    monkeypatch: pytest.MonkeyPatch,
    max_gathered: int,
    max_reuse: int,
    recomputes: bool,
    counted: tuple[int, int],
) -> None:
    """Counted in rehearsals with DeepSpeed's limits at these: 2 micro-batches, and 1."""
    monkeypatch.setattr(module, "_MAX_GATHERED_ELEMENTS", max_gathered)
    monkeypatch.setattr(module, "_MAX_REUSE_ELEMENTS", max_reuse)
    model = ModelSection(num_layers=6, width=512, num_heads=4), 600
    bucket = bucket_elements(sum(one.elements for one in Parameters.of(*model).in_order))

    found, later = (
        weight_gathers.__wrapped__(*model, bucket, is_first=is_first, recomputes=recomputes)
        for is_first in (True, False)
    )

    again = found.again if recomputes else found.again + later.again
    assert (found.whole, again) == counted
