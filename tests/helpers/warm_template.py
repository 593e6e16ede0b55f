"""The template of warm starts: `python -m tests.helpers.warm_template DESCRIPTOR ROOM`.

It imports what commands and ranks import, and forks a process for each request that it reads from
the socket DESCRIPTOR. A forked process first forks a template for processes that it will start.
See warm_start.py.
"""

import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from megaback import own_process
from tests.helpers.warm_start import FAULT_VARIABLE, WORKER_WORD, use_template

_MODULES = (
    "data_pipeline.build.command",
    "torch._dynamo",
    "deepspeed.runtime.zero.stage3",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "sentencepiece",
    "launcher.train",
    "megaback.train",
    "rich.progress",
    "tools.convert",
    "tools.sample",
)
_DESCRIPTORS = 64
"""Most descriptors that a process is started with."""
_HIGH = 512
"""A number above those of the descriptors that a process is started with."""
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a process for each request. Returns in such a process, with its request."""
    while True:
        head, descriptors, _, _ = socket.recv_fds(connection, 4, _DESCRIPTORS)
        if not head:
            os._exit(0)
        content = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
        reading, writing = os.pipe()
        between = os.fork()
        if not between:
            parent = os.getpid()
            pid = os.fork()
            if not pid:
                while os.getppid() == parent:  # until the process that asked for it is its parent
                    time.sleep(0.0002)
                os.close(reading)
                os.close(writing)
                connection.close()
                return json.loads(content), descriptors
            os.write(writing, pid.to_bytes(4, "big"))
            os._exit(0)
        os.waitpid(between, 0)
        connection.sendall(os.read(reading, 4))
        for number in (reading, writing, *descriptors):
            os.close(number)


def next_process(connection: socket.socket) -> dict[str, Any]:
    """Serve as a template. Returns in a forked process, with its request and a template."""
    while True:
        request, descriptors = serve(connection)
        ours, connection = socket.socketpair()
        if os.fork():
            connection.close()
            high = fcntl.fcntl(ours.fileno(), fcntl.F_DUPFD_CLOEXEC, _HIGH)
            ours.close()
            _renumber(descriptors, request["numbers"])
            use_template(socket.socket(fileno=high))
            return request
        ours.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _renumber(descriptors: list[int], numbers: list[int]) -> None:
    """Move descriptors to numbers, which may be those of other ones of them."""
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for copy, number in zip(copies, numbers, strict=True):
        os.dup2(copy, number)
        os.close(copy)


def become(request: dict[str, Any]) -> None:
    """Take on the circumstances of a requested process."""
    if request["has_own_session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.orig_argv = request["words"]
    _show_words(sys.orig_argv)
    if sys.orig_argv[-1] == WORKER_WORD:
        sys.argv = ["-c", WORKER_WORD]  # its parent sends it the import path
        sys.warnoptions += [word[2:] for word in sys.orig_argv if word.startswith("-W")]
        for option in sys.warnoptions:
            warnings._setoption(option)  # type: ignore[attr-defined]
        # It runs the parent's module a second time, as __mp_main__.
        warnings.filterwarnings("ignore", ".* found in sys.modules after", RuntimeWarning)
    elif "-m" not in sys.orig_argv[:3]:
        sys.argv = sys.orig_argv[1:]
        sys.path[0] = str(Path(sys.argv[0]).parent)
    elif sys.orig_argv[1] == "-P":
        sys.argv = ["-m", *sys.orig_argv[4:]]
        del sys.path[0]
    else:
        sys.argv = ["-m", *sys.orig_argv[3:]]
        sys.path[0] = str(Path.cwd())
    _open_standard_streams()
    for option in filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")):
        warnings._setoption(option)  # type: ignore[attr-defined]
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if own_process.is_own_process():
        own_process.put_packages_first()
        own_process.end_at_ctrl_c()
        own_process.skip_collections_at_exit()
    if FAULT_VARIABLE in os.environ:
        sys.path[1:1] = filter(None, os.environ["PYTHONPATH"].split(os.pathsep))
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def run() -> None:
    """Run the module or the script that the words of this process name."""
    main_module = ModuleType("__main__")
    # Under the second name, workers that are spawned send objects of the first one's classes.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module
    if sys.argv[0] == "-c":
        exec(sys.orig_argv[-2], vars(main_module))
        return
    if sys.argv[0] != "-m":
        main_module.__file__ = sys.argv[0]
        code = compile(Path(sys.argv[0]).read_bytes(), sys.argv[0], "exec")
        exec(code, vars(main_module))
        return
    module = sys.orig_argv[-len(sys.argv)]
    for name in (module, f"{module}.__main__"):
        if name in sys.modules and not hasattr(sys.modules[name], "__path__"):
            del sys.modules[name]
    runpy._run_module_as_main(module)  # type: ignore[attr-defined]


def _open_standard_streams() -> None:
    """Open what Python opens as it starts, on the descriptors of this process."""
    is_unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before = getattr(sys, name)
        binary = open(  # noqa: SIM115 (as long as the process)
            number, "wb" if number else "rb", 0 if number and is_unbuffered else -1, closefd=False
        )
        stream = io.TextIOWrapper(
            binary,
            before.encoding,
            before.errors,
            line_buffering=not is_unbuffered and (name == "stderr" or binary.isatty()),
            write_through=is_unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _show_words(words: list[str]) -> None:
    """Replace the words of this process in /proc, by which tests find a rank; NULs follow them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    content = b"".join(os.fsencode(word) + b"\0" for word in words)
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, content, min(len(content), end - start - 1))


def main() -> None:
    """Import the modules, and serve; a forked process runs its module to its end."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
    for name in _MODULES:
        importlib.import_module(name)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a fork would miss the other threads"
    for number in _HANDLED:
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    become(next_process(socket.socket(fileno=int(sys.argv[1]))))
    run()


if __name__ == "__main__":
    main()
