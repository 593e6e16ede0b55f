"""Long work in steps: a generator that yields between them, so that its caller can stop it.

A step is the work between two yields: where possible, at most one layer of a model over a few
hundred tokens, or one text. Closing the generator cancels the rest.
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
