"""What tests of Ctrl-C share."""

import signal


def hearing_ctrl_c() -> None:
    """In a process that begins: Ctrl-C is heard, even if the tests run in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
