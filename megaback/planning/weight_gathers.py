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
from megaback.config_finetune import LoraSection
from megaback.planning.parameters import BACKWARD_MODULES, Parameter, Parameters, factors_of

PERSISTENT_ELEMENTS = 100_000
"""Largest weight that is always gathered: DeepSpeed's stage3_param_persistence_threshold."""
_MAX_GATHERED_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters."""
_MAX_REUSE_ELEMENTS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance."""

_Event = tuple[Parameter | None, bool]
"""A module's weight, if it has one, and whether the module begins; otherwise it ends."""
_RecomputedEvent = tuple[Parameter | None, bool, Parameter | None]
"""The same, and in a block that is recomputed the weight whose backward pass does so."""
_Block = dict[str, Parameter]
"""Weights of a block by module."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class WeightGathers:
    """Gathers in a micro-batch."""

    calls: int
    """Number of gathers, without copies within nodes."""
    whole: int
    """Number of gathers of weights that were not gathered before in the step."""
    again: int
    whole_elements: int
    """Elements of their weights."""
    again_elements: int


@cache
def weight_gathers(
    shape: ModelSection,
    vocab_size: int,
    bucket_elements: int,
    lora: LoraSection | None = None,
    *,
    is_first: bool,
    recomputes: bool,
) -> WeightGathers:
    """Gathers of a micro-batch.

    `is_first`: whether it is a step's first; `recomputes`: whether blocks are recomputed.
    """
    parameters = Parameters.of(shape, vocab_size, lora)
    # Copies of frozen weights stay from step to step.
    known = {one for one in parameters.in_order if not (is_first and one.is_trained)}
    return _Coordinator(list(_events(parameters, recomputes)), bucket_elements, known).run()


def persistent(parameters: Parameters) -> list[Parameter]:
    """Weights that are always gathered."""
    return [one for one in parameters.in_order if one.elements <= PERSISTENT_ELEMENTS]


def _events(parameters: Parameters, recomputes: bool) -> Iterator[_RecomputedEvent]:
    """Begins and ends of modules, but not of those without weights, whose ends do nothing."""

    def whole(one: Parameter) -> Iterator[_Event]:
        yield one, True
        yield one, False

    def module(block: _Block, name: str) -> Iterator[_Event]:
        if name not in block:
            return
        factors = [block[one] for one in factors_of(name) if one in block]
        if factors:
            yield None, True  # peft's layer
        yield from whole(block[name])
        if factors:
            yield None, True  # its dropout
        for factor in factors:
            yield from whole(factor)

    def forward(block: _Block) -> Iterator[_Event]:
        yield None, True
        yield from whole(block["input_layernorm"])
        for names, norm in ((_ATTENTION, None), (_MLP, "post_attention_layernorm")):
            if norm is not None:
                yield from whole(block[norm])
            yield None, True
            for name in names:
                yield from module(block, name)

    def module_backward(block: _Block, name: str, *, has_input: bool) -> Iterator[_Event]:
        """A weight is released where its module's input has a gradient."""
        weights = [block[one] for one in (*reversed(factors_of(name)), name) if one in block]
        *factors, weight = weights
        if factors:
            yield None, True
        for factor in factors:
            yield factor, True
            if has_input or factor is factors[0]:
                yield factor, False
        if factors and has_input:
            yield None, True
        if has_input or weight.is_trained:
            yield weight, True
        if has_input:
            yield weight, False

    def backward(block: _Block, *, has_input: bool) -> Iterator[_RecomputedEvent]:
        yield None, True, None
        inputs = _inputs_with_gradients(block, has_input=has_input)
        recomputed = list(forward(block))[:-1] if recomputes else []
        for name in BACKWARD_MODULES:
            if name not in inputs:
                continue
            if name in ("down_proj", "o_proj"):
                yield None, True, None
            for weight, begins in module_backward(block, name, has_input=inputs[name]):
                yield weight, begins, None
                if weight is not None:
                    # Recomputing ends as soon as the last module's inputs are there.
                    yield from ((*one, weight) for one in recomputed)
                    recomputed = []

    def outside() -> Iterator[_Event]:
        yield None, True
        yield from whole(parameters.embedding)
        for block in parameters.blocks:
            yield from forward(block)
        yield from whole(parameters.norm)
        yield from whole(parameters.head)
        yield None, True
        yield from whole(parameters.head)
        yield from whole(parameters.norm)

    yield from ((*one, None) for one in outside())
    is_trained = parameters.embedding.is_trained
    for layer, block in reversed(list(enumerate(parameters.blocks))):
        yield from backward(block, has_input=is_trained or layer > 0)
    if is_trained:
        yield from ((*one, None) for one in whole(parameters.embedding))


def _inputs_with_gradients(block: _Block, *, has_input: bool) -> dict[str, bool]:
    """Modules of a block that a backward pass reaches, and whether their inputs have gradients.

    Without trained weights before them, neither inputs nor frozen modules of the first block have
    gradients.
    """
    found: dict[str, bool] = {}

    def output(name: str, *, given: bool) -> bool:
        weights = [block[one] for one in (name, *factors_of(name)) if one in block]
        if not weights:
            return given
        reached = given or any(one.is_trained for one in weights)
        if reached:
            found[name] = given
        return reached

    normed = output("input_layernorm", given=has_input)
    heads = [output(f"{name}_proj", given=normed) for name in "qkv"]
    heads[:2] = [output(f"{name}_norm", given=one) for name, one in zip("qk", heads, strict=False)]
    hidden = output("o_proj", given=any(heads)) or has_input
    normed = output("post_attention_layernorm", given=hidden)
    gated = [output(name, given=normed) for name in ("gate_proj", "up_proj")]
    output("down_proj", given=any(gated))
    return found


class _Coordinator:
    """State of DeepSpeed's coordinator over a micro-batch."""

    def __init__(
        self, events: list[_RecomputedEvent], bucket_elements: int, known: set[Parameter]
    ) -> None:
        self._events, self._bucket_elements, self._known = events, bucket_elements, known
        self._uses = [one for one, begins, _ in events if begins]
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
        self._recomputed: dict[Parameter, set[Parameter]] = {}
        """Frozen weights that are released with the weight whose backward pass recomputes them."""
        self._step = self._calls = self._whole = self._again = 0
        self._whole_elements = self._again_elements = 0

    def run(self) -> WeightGathers:
        for one, begins, owner in self._events:
            if begins:
                self._fetch(one)
                if owner is not None and one is not None and not one.is_trained:
                    self._recomputed.setdefault(owner, set()).add(one)
            elif one is not None:
                self._release(one)
        elements = self._whole_elements, self._again_elements
        return WeightGathers(self._calls, self._whole, self._again, *elements)

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
        self._calls += bool(missing)
        # Those with a copy within the node are gathered in a call of their own.
        self._again += any(one in self._known for one in missing)
        self._whole += any(one not in self._known for one in missing)
        self._gathered.update(missing)
        num_elements = sum(one.elements for one in missing)
        num_again = sum(one.elements for one in missing if one in self._known)
        self._gathered_elements += num_elements
        self._again_elements += num_again
        self._whole_elements += num_elements - num_again

    def _release(self, one: Parameter) -> None:
        for other in self._recomputed.pop(one, set()) & self._gathered:
            self._drop(other)
        if one not in self._gathered or self._fetched_for[one] > self._step:
            return
        later = self._steps[one]
        while later and later[0] < self._step:
            later.popleft()
        if later and self._passed[later[0]] - self._passed[self._step] < _MAX_REUSE_ELEMENTS:
            return
        self._drop(one)

    def _drop(self, one: Parameter) -> None:
        self._gathered.remove(one)
        self._gathered_elements -= one.elements
        self._known.add(one)
