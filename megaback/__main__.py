"""Entry point of the `megaback` command: installs signal handlers before the slow imports."""

import sys

from data_pipeline.common.interrupts import take_signals
from megaback.installation import HIDDEN, is_whole


def main() -> None:
    """Run the command line of this process."""
    take_signals()
    if not is_whole():
        from data_pipeline.common.command import report
        from data_pipeline.errors import LaunchError

        sys.exit(report(LaunchError(HIDDEN)))
    from megaback.cli import main as command

    command(prog_name="megaback")


if __name__ == "__main__":
    main()
