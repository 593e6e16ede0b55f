"""Example commands that use a model, by its direction and training data. Loads no torch."""

from pathlib import Path

from data_pipeline.common.next_command import command
from data_pipeline.text.codec import Directions

_ENDING, _BEGINNING = "the end.", "Once upon a time"
_RESPONSE, _INSTRUCTION = "You are welcome.", "Name a color."


def use_commands(path: Path, directions: Directions, *, on_examples: bool) -> dict[str, str]:
    """Commands that generate from a model, a run or a checkpoint, and the output of each."""
    is_backward = directions is not Directions.FORWARD
    if on_examples and is_backward:
        return {command("chat", path, "--response", _RESPONSE): "the instruction for a response"}
    if on_examples:
        return {command("chat", path, "--instruction", _INSTRUCTION): "a response"}
    use = {}
    if is_backward:
        use[command("sample", path, "--ending", _ENDING)] = "generate the text before it"
    if directions is not Directions.BACKWARD:
        use[command("sample", path, "--beginning", _BEGINNING)] = "the text after it"
    return use
