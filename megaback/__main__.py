"""The process of the `megaback` command: signals come first, then what takes time to import."""

import sys

from data_pipeline.common.interrupts import take_signals
from megaback.installation import HIDDEN, is_whole


def main() -> None:
    """Run the command that this process was started for."""
    take_signals()
    if not is_whole():
        from data_pipeline.common.command import report
        from data_pipeline.errors import LaunchError

        sys.exit(report(LaunchError(HIDDEN)))
    from megaback.cli import main as command

    command(prog_name="megaback")


if __name__ == "__main__":
    main()
