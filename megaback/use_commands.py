"""What to type to use a model, by its direction and what it was trained on. Loads no torch."""

from pathlib import Path

from data_pipeline.common.next_command import command
from data_pipeline.text.codec import Direction

_ENDING, _BEGINNING = "the end.", "Once upon a time"
_RESPONSE, _INSTRUCTION = "You are welcome.", "Name a color."


def use_commands(path: Path, direction: Direction, *, on_examples: bool) -> dict[str, str]:
    """A command that writes with a model, a run or a checkpoint, and what it does."""
    is_backward = direction is Direction.BACKWARD
    if on_examples and is_backward:
        return {command("chat", path, "--response", _RESPONSE): "the instruction for a response"}
    if on_examples:
        return {command("chat", path, "--instruction", _INSTRUCTION): "a response"}
    if is_backward:
        return {command("sample", path, "--ending", _ENDING): "writes what comes before"}
    return {command("sample", path, "--beginning", _BEGINNING): "writes what comes after"}
