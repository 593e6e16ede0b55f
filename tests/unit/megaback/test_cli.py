"""Unknown commands of the `megaback` command and its groups."""

import pytest
from click.testing import CliRunner

from megaback.cli import main


@pytest.mark.parametrize(
    ("arguments", "suggested"),
    [(["trian"], "'train'"), (["shard"], "'shards'"), (["shards", "biuld"], "'build'")],
)
def test_for_a_mistyped_command_the_close_ones_are_suggested(
    arguments: list[str], suggested: str
) -> None:
    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert f"No such command {arguments[-1]!r}. Did you mean {suggested}?" in result.output


def test_for_a_command_that_is_like_no_other_nothing_is_suggested() -> None:
    result = CliRunner().invoke(main, ["qqq"])

    assert result.exit_code == 2
    assert "Did you mean" not in result.output


def test_the_address_in_an_unknown_command_is_shown_without_its_password() -> None:
    result = CliRunner().invoke(main, ["https://user:word@host/train"])

    assert "word@" not in result.output
