"""Type of the options that name a source: a shipped one, a path, pattern or URL, or `hf:NAME`."""

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType


class SourceType(StringParamType):
    """Text that may be a pattern, which the shell must not expand, and that completes as a path."""

    name = "source"

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


SOURCE = SourceType()
