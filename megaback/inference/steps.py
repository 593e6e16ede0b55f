"""Long work in steps: a generator that yields between them, so that whoever runs it can stop.

A step is the work between two yields, at most one layer of a model over a few hundred tokens or
one text where the work allows it. Closing the generator cancels what is left.
"""

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")

Steps = Generator[None, None, Result]


def finish(steps: "Steps[Result]") -> Result:
    """Run all steps at once."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: Result = end.value
        return result
