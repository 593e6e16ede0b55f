"""Number of times that ZeRO 3 gathers weights in a micro-batch. Loads no torch.

DeepSpeed 0.19 records the order of a step's modules. At each module it gathers the weights that it
needs, if they are not there, and in one more call those of the next modules, up to a bucket
(`PartitionedParameterCoordinator`). Weights that are used again soon stay gathered, and small ones
always. This does the same with the sizes alone.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megaback.config import ModelSection
from megaback.planning.parameters import BACKWARD_MODULES, Parameter, Parameters

PERSISTENT_ELEMENTS = 100_000
"""Largest weight that is always gathered: DeepSpeed's stage3_param_persistence_threshold."""
_MAX_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters."""
_MAX_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance."""

_Event = tuple[Parameter | None, bool]
"""A module's weight, if it has one, and whether the module begins; otherwise it ends."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class WeightGathers:
    """Number of gathers in a micro-batch."""

    whole: int
    """Gathers of weights that were not gathered before in the step."""
    again: int


@cache
def weight_gathers(
    shape: ModelSection, vocab_size: int, bucket_elements: int, *, is_first: bool, recomputes: bool
) -> WeightGathers:
    """Gathers of a micro-batch.

    `is_first`: whether it is a step's first; `recomputes`: whether blocks are recomputed.
    """
    parameters = Parameters.of(shape, vocab_size)
    known: set[Parameter] = set() if is_first else set(parameters.in_order)
    return _Coordinator(list(_events(parameters, recomputes)), bucket_elements, known).run()


def persistent(parameters: Parameters) -> list[Parameter]:
    """Weights that are always gathered."""
    return [one for one in parameters.in_order if one.elements <= PERSISTENT_ELEMENTS]


def _events(parameters: Parameters, recomputes: bool) -> Iterator[_Event]:
    """Begins and ends of modules, but not of those without weights, whose ends do nothing."""

    def whole(one: Parameter) -> Iterator[_Event]:
        yield one, True
        yield one, False

    def forward(block: dict[str, Parameter]) -> Iterator[_Event]:
        yield None, True
        yield from whole(block["input_layernorm"])
        for names, norm in ((_ATTENTION, None), (_MLP, "post_attention_layernorm")):
            if norm is not None:
                yield from whole(block[norm])
            yield None, True
            for name in names:
                if name in block:
                    yield from whole(block[name])

    def backward(block: dict[str, Parameter]) -> Iterator[_Event]:
        yield None, True
        for name in BACKWARD_MODULES:
            if name not in block:
                continue
            if name in ("down_proj", "o_proj"):
                yield None, True
            yield block[name], True
            if name == "down_proj" and recomputes:
                # Recomputing ends as soon as the last module's inputs are there.
                yield from list(forward(block))[:-1]
            yield block[name], False

    yield None, True
    yield from whole(parameters.embedding)
    for block in parameters.blocks:
        yield from forward(block)
    yield from whole(parameters.norm)
    yield from whole(parameters.head)
    yield None, True
    yield from whole(parameters.head)
    yield from whole(parameters.norm)
    for block in reversed(parameters.blocks):
        yield from backward(block)
    yield from whole(parameters.embedding)


class _Coordinator:
    """State of DeepSpeed's coordinator over a micro-batch."""

    def __init__(self, events: list[_Event], bucket_elements: int, known: set[Parameter]) -> None:
        self._events, self._bucket_elements, self._known = events, bucket_elements, known
        self._uses = [one for one, begins in events if begins]
        self._queue = deque((one, step) for step, one in enumerate(self._uses) if one is not None)
        self._passed = [0]
        """Elements of the modules before each step."""
        self._steps: dict[Parameter, deque[int]] = {}
        for step, one in enumerate(self._uses):
            self._passed.append(self._passed[-1] + (0 if one is None else one.elements))
            if one is not None:
                self._steps.setdefault(one, deque()).append(step)
        self._gathered: set[Parameter] = set()
        self._gathered_elements = 0
        self._fetched_for: dict[Parameter, int] = {}
        """Last step for which a weight was gathered."""
        self._step = self._whole = self._again = 0

    def run(self) -> WeightGathers:
        for one, begins in self._events:
            if begins:
                self._fetch(one)
            elif one is not None:
                self._release(one)
        return WeightGathers(self._whole, self._again)

    def _fetch(self, one: Parameter | None) -> None:
        if one is not None:
            self._gather([one])
            if self._fetched_for.get(one, -1) < self._step:
                self._fetched_for[one] = self._queue.popleft()[1]
        room = min(_MAX_GATHERED_ELEMENTS - self._gathered_elements, self._bucket_elements)
        ahead: list[Parameter] = []
        while self._queue and sum(other.elements for other in ahead) < room:
            other, step = self._queue.popleft()
            self._fetched_for[other] = max(self._fetched_for.get(other, -1), step)
            if self._is_missing(other) and other not in ahead:
                ahead.append(other)
        self._gather(ahead)
        self._step += 1

    def _is_missing(self, one: Parameter) -> bool:
        return one.elements > PERSISTENT_ELEMENTS and one not in self._gathered

    def _gather(self, wanted: list[Parameter]) -> None:
        missing = [one for one in wanted if self._is_missing(one)]
        # Those with a copy within the node are gathered in a call of their own.
        self._again += any(one in self._known for one in missing)
        self._whole += any(one not in self._known for one in missing)
        self._gathered.update(missing)
        self._gathered_elements += sum(one.elements for one in missing)

    def _release(self, one: Parameter) -> None:
        if one not in self._gathered or self._fetched_for[one] > self._step:
            return
        later = self._steps[one]
        while later and later[0] < self._step:
            later.popleft()
        if later and self._passed[later[0]] - self._passed[self._step] < _MAX_REUSE_ELEMENTS:
            return
        self._gathered.remove(one)
        self._gathered_elements -= one.elements
        self._known.add(one)
