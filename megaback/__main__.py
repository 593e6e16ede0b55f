"""`python -m megaback` is the `megaback` command."""

import sys

from megaback.installation import HIDDEN, is_whole

if not is_whole():
    from data_pipeline.command import report
    from data_pipeline.errors import LaunchError

    sys.exit(report(LaunchError(HIDDEN)))

from megaback.cli import main

main(prog_name="megaback")
