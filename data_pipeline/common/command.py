"""Base class of all megaback commands: error messages and exit codes.

For a `MegabackError`, its message is printed to stderr and its code is the exit code. Errors of the
operating system are reported in the same way. Anything else is a defect of megaback and keeps its
traceback.
"""

import errno
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.console import (
    ReaderGoneError,
    is_result_unread,
    only_comments,
    protect_console,
)
from data_pipeline.common.control_characters import on_one_line
from data_pipeline.common.device_memory import memory_error_of_use
from data_pipeline.common.interrupts import (
    Interrupted,
    at_work,
    interrupt_message,
    leave,
    received_signal,
    take_signals,
)
from data_pipeline.common.logging_setup import set_up_logging, verbose_option
from data_pipeline.common.unquoted import require_quoted, too_many
from data_pipeline.errors import BackendError, ConfigError, MegabackError, StorageError
from data_pipeline.redaction import scrub

READER_GONE_CODE = 141
"""128 + SIGPIPE: the status that a shell reports for a program whose reader has exited."""

_OS_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a path on a writable disk",
    errno.EACCES: "check the permissions of the path",
    errno.EPERM: "check the permissions of the path",
    errno.ELOOP: "remove the symbolic link at that path; files are not written through links",
}
_EXAMPLE_COLUMNS = 74
_WORDS = re.compile(r"""(?:--?[a-z][a-z-]* (?![-<>])|[<>] )?(?:"[^"]*"|'[^']*'|[^\s"'])+""")
"""Words of a command line, an option with its value."""
_ARGUMENT = re.compile(r"`([a-z][a-z_]*)`")
_PROGRAM_ADVICE = {
    **dict.fromkeys(("cc", "gcc", "g++", "c++"), "install a C compiler (build-essential)"),
    **dict.fromkeys(
        ("sbatch", "scontrol", "srun", "sinfo", "squeue", "sacct", "scancel"),
        "run it where Slurm's commands are installed, on a login node or outside the container",
    ),
    "ssh": "install openssh-client",
    "ninja": "install ninja (pip install ninja)",
}


def storage_error(error: OSError) -> StorageError:
    """Convert an operating system error; the message names the path."""
    where = f" {error.filename!r}" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    advice = _OS_ADVICE.get(error.errno or 0, "check the path and the disk behind it")
    return StorageError(f"cannot read or write{where}: {reason}; {advice}")


def system_error(error: OSError) -> MegabackError:
    """Convert an operating system error: a missing program, or a storage error."""
    return _program_error(error) or storage_error(error)


def _program_error(error: OSError) -> BackendError | None:
    """The error for a program that could not be started; None for any other error.

    A missing file and a missing program both raise FileNotFoundError. For a program, the error is
    raised within `subprocess`, even if a library started it (a compiler, for example).
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_code.co_filename != subprocess.__file__:
        return None
    if error.filename is None or Path(os.fsdecode(error.filename)).is_dir():
        return None
    program = Path(os.fsdecode(error.filename)).name
    if isinstance(error, FileNotFoundError):
        return BackendError(
            f"the program {program} is not installed or not on the PATH; "
            f"{_PROGRAM_ADVICE.get(program, 'install it')}, then run the same command again"
        )
    return BackendError(
        f"the program {error.filename} cannot be started: {error.strerror}; make it executable, "
        "or install it again"
    )


def with_options(message: str) -> str:
    """Replace the arguments in a library's message, in backticks, with options of the running
    command."""
    context = click.get_current_context(silent=True)
    options = {}
    for one in context.command.params if context else ():
        if isinstance(one, click.Option):
            names = (one.name or "", *(word.strip("-").replace("-", "_") for word in one.opts))
            options.update(dict.fromkeys(names, max(one.opts, key=len)))
    return _ARGUMENT.sub(lambda found: options.get(found[1], found[0]), message)


def report(error: MegabackError) -> int:
    """Print an error to stderr; return its exit code."""
    _print_error(f"megaback: error: {on_one_line(with_options(str(error)))}")
    return error.exit_code


def _print_error(line: str) -> None:
    with suppress(OSError):  # without a reader, the exit code remains
        print(line, file=sys.stderr, flush=True)


def scrubbed(error: click.UsageError) -> click.UsageError:
    """The usage error without secrets of the addresses that it quotes."""
    message = error.format_message()
    return error if scrub(message) == message else click.UsageError(scrub(message), error.ctx)


def run_as_process(main: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run the command of this process, with its console, signals and logging set up.

    A command that is called from a test or a notebook runs without that setup.
    """
    if sys.stdout is not sys.__stdout__:  # a test or a notebook captures the output
        return main(*arguments, **options)
    protect_console()
    take_signals()
    try:
        set_up_logging()
    except ConfigError as error:
        raise SystemExit(report(error)) from None
    try:
        return main(*arguments, **options)
    except SystemExit as ending:
        if ending.code == 1 and is_result_unread():  # click's own, for a help page
            raise SystemExit(READER_GONE_CODE) from None
        if received_signal() is not None and isinstance(ending.code, int):
            leave(ending.code)
        raise
    except OSError as error:  # a help page on a full disk
        raise SystemExit(report(storage_error(error))) from None


def examples(*commands: str) -> str:
    """Epilog of a command's help with command lines, which are wrapped as a shell reads them."""
    lines = []
    for command in commands:
        first, *words = _WORDS.findall(command)
        lines.append(first)
        for word in words:
            if len(lines[-1]) + 1 + len(word) > _EXAMPLE_COLUMNS:
                lines[-1] += " \\"
                lines.append(f"  {word}")
            else:
                lines[-1] += f" {word}"
    return "\n".join(["Examples:", "", "\b", *lines])


class WithShortHelp(click.Command):
    """A command or group with `-h` for help."""

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return [*super().get_help_option_names(ctx), "-h"]


class CommandGroup(WithShortHelp, click.Group):
    """A group of commands."""


class Command(WithShortHelp):
    """A click command that reports each `MegabackError` and exits with its code.

    Its standard output is its result: see `data_pipeline.common.console`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.append(verbose_option())

    def main(self, *arguments: Any, **options: Any) -> Any:
        return run_as_process(super().main, *arguments, **options)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        # Without color, click would strip escape sequences from results in a pipe.
        return super().make_context(*arguments, **{"color": True, **options})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = list(args)
        if not ctx.resilient_parsing:
            require_quoted(self, words)
        try:
            rest = super().parse_args(ctx, args)
        except click.UsageError as error:
            raise scrubbed(too_many(error, words)) from None
        if not ctx.resilient_parsing:
            self._require_no_empty_path(ctx, words)
        return rest

    def _require_no_empty_path(self, ctx: click.Context, words: list[str]) -> None:
        """An empty path would be the working directory. Raises UsageError."""
        given, _, _ = self.make_parser(ctx).parse_args(args=words)
        for parameter in self.params:
            value = given.get(parameter.name or "")
            values = value if isinstance(value, list | tuple) else [value]
            is_path = isinstance(parameter.type, click.Path)
            if is_path and "" in values:
                raise click.BadParameter(
                    "it is empty, perhaps from an unset shell variable; give a path",
                    ctx,
                    parameter,
                )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with at_work():
                result = super().invoke(ctx)
                if sys.stdout is not None:
                    sys.stdout.flush()
                return result
        except BaseException as error:
            code = self._code_of(error)
            if code is None:
                raise
            raise SystemExit(code) from None

    def _code_of(self, error: BaseException) -> int | None:
        """Report an error; return its exit code, or None for a defect."""
        number = error.number if isinstance(error, Interrupted) else received_signal()
        if number is None and isinstance(error, KeyboardInterrupt):
            number = signal.SIGINT  # raised by a program that calls this command
        if number is not None:
            line = interrupt_message(number, self._advice())
            _print_error(f"\n{line}" if sys.stderr is not None and sys.stderr.isatty() else line)
            return 128 + number
        if isinstance(error, MegabackError):
            return report(error)
        if isinstance(error, ReaderGoneError):
            return READER_GONE_CODE
        if isinstance(error, OSError):
            return report(system_error(error))
        memory_error = memory_error_of_use(error)
        return None if memory_error is None else report(memory_error)

    def _advice(self) -> str:
        return ""


class WorkCommand(Command):
    """A command whose result is a file, a run or a service; its output is a comment."""

    def invoke(self, ctx: click.Context) -> Any:
        only_comments()
        return super().invoke(ctx)


class ResumableCommand(WorkCommand):
    """A command that resumes when it is run again."""

    def _advice(self) -> str:
        return "run the same command to resume"
