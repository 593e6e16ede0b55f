"""A process that prints what it was started with, as JSON, and then ends as its words say.

`python -m tests.helpers.process_facts [exit CODE | fail | start | wait | work]`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.common.process_pool import run_in_processes
from tests.helpers.warm_start import COLD_VARIABLE


def facts() -> dict[str, Any]:
    """The circumstances of this process."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE)
    return {
        "words": sys.argv[1:],
        "original_words": sys.orig_argv,
        "shown_words": Path("/proc/self/cmdline").read_text().rstrip("\0"),
        "file": sys.argv[0],
        "module": sys.modules["__main__"].__spec__.name,  # type: ignore[union-attr]
        "path": sys.path,
        "folder": str(Path.cwd()),
        "environment": {name: os.environ[name] for name in os.environ if name != COLD_VARIABLE},
        "parent": os.getppid(),
        "has_own_session": os.getsid(0) == os.getpid(),
        "handlers": [str(signal.getsignal(number)).partition(" at ")[0] for number in handled],
        "blocked": [*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))],
        "input": sys.stdin.read(),
        "is_terminal": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "encodings": [stream.encoding for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "line_buffering": [stream.line_buffering for stream in (sys.stdout, sys.stderr)],
    }


def tell() -> None:
    """Print the facts."""
    before = {"is_warm": "torch" in sys.modules, "pid": os.getpid()}
    print(json.dumps(facts() | before), flush=True)
    print("a comment", file=sys.stderr)


def main() -> None:
    """Print the facts, and end."""
    tell()
    match sys.argv[1:]:
        case ["exit", code]:
            sys.exit(int(code))
        case ["fail"]:
            raise RuntimeError("as asked")
        case ["start"]:
            words = [sys.executable, "-m", "tests.helpers.process_facts"]
            subprocess.run(words, stdin=subprocess.DEVNULL, check=True)
        case ["wait"]:
            time.sleep(60)
        case ["work"]:
            list(run_in_processes(tell, [()], workers=1))


if __name__ == "__main__":
    main()
