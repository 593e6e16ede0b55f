"""A gap between two texts, as a forward and a backward model read its edges.

Each model's prompt holds back the token next to the gap, so that the middle may begin within a
word. A join is rendered as a whole, and accepted only if both given texts are unchanged in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.errors import PromptError
from data_pipeline.text.codec import TextCodec

_CUT_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class InfillPrompts:
    """A beginning and an ending."""

    beginning: str
    ending: str
    codec: TextCodec
    """Codec of the forward model."""
    before: tuple[int, ...]
    """The forward model's prompt."""
    before_held: int
    """The id that it holds back."""
    after: tuple[int, ...]
    """The backward model's prompt, in its reading order."""
    after_held: int

    @classmethod
    def between(
        cls, forward: TextCodec, backward: TextCodec, beginning: str, ending: str
    ) -> "InfillPrompts":
        """Raises PromptError if a text is empty."""
        for name, text in (("beginning", beginning), ("ending", ending)):
            if not text:
                raise PromptError(
                    f"the {name} is empty; give a text, or use `megaback sample`, which needs only "
                    "one text"
                )
        return cls(
            beginning=beginning,
            ending=ending,
            codec=forward,
            before=tuple(forward.prompt(beginning).ids),
            before_held=int(forward.encode(beginning)[-1]),
            after=tuple(backward.prompt(ending).ids),
            after_held=int(backward.encode(ending)[-1]),
        )

    def middle(self, onwards: Sequence[int], backwards: Sequence[int]) -> str | None:
        """The text between, from the ids that continue the forward and the backward prompt.

        Both are in the reading order of their model. None if the text is empty, or if the join
        splits a character.
        """
        ids = [*self.before, *onwards, *reversed(backwards), *reversed(self.after)]
        text = self.codec.render(ids)
        middle = text[len(self.beginning) : len(text) - len(self.ending)]
        is_whole = text == self.beginning + middle + self.ending and _CUT_CHARACTER not in middle
        return middle if middle and is_whole else None
