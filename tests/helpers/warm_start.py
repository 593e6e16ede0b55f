"""Warm starts: processes forked from a template that has imported torch and the packages.

A module or benchmark of ours takes seconds to import torch and DeepSpeed, which is most of the
time of a test that starts commands or ranks. With `use_warm_starts`, `subprocess` forks such a
process from a template (`warm_template`), and so does `multiprocessing` a worker that it spawns.
It is a child of this process, with its own arguments,
environment, working directory, session, signals, descriptors and interpreter teardown; only its
modules are not imported again. A start that could see a difference is an ordinary one: another
interpreter, `-c`, variables that are read during imports, or `COLD_VARIABLE` in its environment.
"""

import ctypes
import inspect
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import util
from pathlib import Path
from typing import Any

from tests.helpers.interrupting import hearing_ctrl_c
from tests.helpers.paths import ROOT

COLD_VARIABLE = "MEGABACK_TESTS_COLD"
"""Set for a process that is to import everything itself."""
FAULT_VARIABLE = "FAULT"
"""Set for a process with the fault injector, a `sitecustomize` in PYTHONPATH."""
_FREE_VARIABLES = ("PYTHONWARNINGS", "PYTHONUNBUFFERED")
"""Variables that are read during start-up, and that a warm start handles."""
_PACKAGES = ("benchmarks", "data_pipeline", "launcher", "megaback", "tests", "tools")
_SCRIPTS = ROOT / "benchmarks"
_READ_AT_START = (
    *("PYTHON", "LD_", "LANG", "LC_", "OMP_", "MKL_", "TORCH_LOGS", "DS_", "HF_", "CUDA", "TRITON"),
    *("COVERAGE", "MPL", "XDG_CONFIG"),
)
"""Starts of the names of variables that Python and libraries read while they are imported."""
_ROOM = "-" * 16384
"""For the words of a process, which replace those of its template where `ps` reads them."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl
_START = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_SIGNATURE = inspect.signature(_START)
_SPAWN = util.spawnv_passfds
WORKER_WORD = "--multiprocessing-fork"
"""The last word of a worker that `multiprocessing` spawns."""
_SAFE_PATH = "PYTHONSAFEPATH"
"""Set while a worker is spawned, whose import path its parent sends."""


class _Template:
    """The template of this process, a process of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.owner = os.getpid()
        self.circumstances = _circumstances(_without_safe_path(os.environ))
        self.lock = threading.Lock()


class _State:
    template: _Template | None = None


def use_warm_starts() -> None:
    """Let processes be started warm; the template is started when it is first needed."""
    subprocess.Popen._execute_child = _execute_child  # type: ignore[attr-defined]
    util.spawnv_passfds = _spawn


def use_template(connection: socket.socket) -> None:
    """Start further processes from a template that runs already."""
    _State.template = _Template(connection)
    use_warm_starts()


def _execute_child(process: "subprocess.Popen[Any]", *arguments: Any) -> None:
    """In place of the method of `subprocess.Popen` that starts the process."""
    call = _SIGNATURE.bind(process, *arguments).arguments
    environment = dict(os.environ if call["env"] is None else call["env"])
    template = _template_for(environment) if _can_be_forked(call) else None
    if template is None:
        _START(process, *arguments)
        return
    ends = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
    request = {
        "words": [os.fspath(word) for word in call["args"]],
        "environment": environment,
        "folder": str(Path(call["cwd"] or ".").absolute()),
        "has_own_session": bool(call["start_new_session"]),
        "numbers": [0, 1, 2],
        **_signals(has_handlers=call["preexec_fn"] is not None),
    }
    descriptors = [number if end == -1 else end for number, end in enumerate(ends)]
    process.pid = _fork(template, request, descriptors)
    process._child_created = True  # type: ignore[attr-defined]
    pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
    process._close_pipe_fds(*(call[name] for name in pipes))  # type: ignore[attr-defined]


def _spawn(path: Any, words: Sequence[Any], descriptors: Sequence[int]) -> int:
    """In place of the function of `multiprocessing` that starts a process. Returns its id."""
    words = [os.fsdecode(word) for word in words]
    is_worker = words[0] == sys.executable and words[-1] == WORKER_WORD
    environment = dict(os.environ)
    template = _template_for(_without_safe_path(environment)) if is_worker else None
    if template is None:
        return _SPAWN(path, words, descriptors)
    request: dict[str, Any] = {
        "words": words,
        "environment": environment,
        "folder": str(Path.cwd()),
        "has_own_session": False,
        "numbers": [0, 1, 2, *descriptors],
        **_signals(has_handlers=False),
    }
    return _fork(template, request, request["numbers"])


def _without_safe_path(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != _SAFE_PATH}


def _signals(has_handlers: bool) -> dict[str, list[int]]:
    """Signals that a new process blocks and, unless it has handlers at once, ignores."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    ignored = [] if has_handlers else [n for n in numbers if signal.getsignal(n) is signal.SIG_IGN]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return {"blocked": [*map(int, blocked)], "ignored": [*map(int, ignored)]}


def _can_be_forked(call: Mapping[str, Any]) -> bool:
    """Whether a call starts a module of ours, with options that a fork can have."""
    words = call["args"]
    if isinstance(words, (str, bytes, os.PathLike)) or call["executable"] or call["shell"]:
        return False
    words = [os.fspath(word) for word in words]
    special = ("pass_fds", "gid", "gids", "uid")
    if call["preexec_fn"] not in (None, hearing_ctrl_c):
        return False
    if any(call.get(name) not in (None, ()) for name in special) or not call["close_fds"]:
        return False
    if call["umask"] != -1 or call.get("process_group", -1) not in (-1, None):
        return False
    python, *options = words
    options = options[1:] if options[:1] == ["-P"] else options
    is_module = options[:1] == ["-m"] and options[1].partition(".")[0] in _PACKAGES
    is_script = bool(options) and Path(options[0]).parent == _SCRIPTS and options == words[1:]
    is_ours = python == sys.executable and (is_module or is_script)
    return is_ours and Path(call["cwd"] or ".").is_dir()


def _circumstances(environment: Mapping[str, str]) -> tuple[object, ...]:
    """Properties of a process that imports depend on, or that a fork has from its template."""
    variables = {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_AT_START) and name not in _FREE_VARIABLES
    }
    variables.pop("DS_ACCELERATOR", None) if variables.get("DS_ACCELERATOR") == "cpu" else None
    if FAULT_VARIABLE in environment:  # its injector changes imported functions
        variables.pop("PYTHONPATH", None)
    kinds = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    limits = [resource.getrlimit(getattr(resource, name)) for name in kinds]
    return variables, limits, os.sched_getaffinity(0)


def _template_for(environment: Mapping[str, str]) -> _Template | None:
    if COLD_VARIABLE in environment:
        return None
    if _State.template is None:
        _State.template = _start_template()
    template = _State.template
    if template.owner != os.getpid() or template.circumstances != _circumstances(environment):
        return None
    return template


def _start_template() -> _Template:
    ours, theirs = socket.socketpair()
    module = "tests.helpers.warm_template"
    command = [sys.executable, "-m", module, str(theirs.fileno()), _ROOM]
    environment = {**_without_safe_path(os.environ), COLD_VARIABLE: "1"}
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    process.returncode = 0  # it ends with this process, which does not wait for it
    theirs.close()
    return _Template(ours)


def _fork(template: _Template, request: Mapping[str, Any], descriptors: Sequence[int]) -> int:
    """The process id of a new child of this process.

    The template forks twice: the process between ends at once, and its child becomes one of the
    nearest ancestor that adopts orphans, which is this process for the moment.
    """
    content = json.dumps(request).encode(errors="surrogateescape")
    with template.lock:
        _adopt_orphans(1)
        try:
            socket.send_fds(template.connection, [len(content).to_bytes(4, "big")], descriptors)
            template.connection.sendall(content)
            answer = template.connection.recv(4, socket.MSG_WAITALL)
            if len(answer) < 4:
                raise RuntimeError("the template of warm starts has ended; see its message above")
        except (
            BaseException
        ):  # also a test's time limit: the answer would be read by the next start
            template.connection.close()
            _State.template = None
            raise
        finally:
            _adopt_orphans(0)
    return int.from_bytes(answer, "big")


@cache
def _prctl() -> Any:
    return ctypes.CDLL(None, use_errno=True).prctl


def _adopt_orphans(is_on: int) -> None:
    if _prctl()(_SUBREAPER, is_on, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
