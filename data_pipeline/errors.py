"""Exceptions of megaback and their exit codes.

Every error that a user can cause is a `MegabackError` whose message says what is wrong, where, and
what to do. Each class has its own exit code, so that scripts can distinguish them. The classes are
here because `data_pipeline` is the lowest layer: every other package may import it.
docs/exit_codes.md lists the codes for users; a test keeps the two equal.
"""

from typing import ClassVar

from data_pipeline.redaction import scrub


class MegabackError(Exception):
    """Error that the user can act on, with a one-sentence message.

    Secrets of addresses are removed from messages, which quote drivers and are kept in records and
    logs.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(scrub(one) if isinstance(one, str) else one for one in arguments))


class ConfigError(MegabackError):
    """A config has an unknown key, a value out of range, or values that contradict each other."""

    exit_code = 10


class BatchError(ConfigError):
    """The global batch cannot be divided among the ranks, lanes or micro-batches."""

    exit_code = 11


class BackendError(MegabackError):
    """A required attention backend, device, precision, library or program is missing."""

    exit_code = 12


class LaunchError(MegabackError):
    """Ranks could not be started, or died without reporting a reason."""

    exit_code = 13


class NotEnoughMemoryError(MegabackError):
    """A run does not fit into its devices' memory; the message names what would fit."""

    exit_code = 14


class SourceMissingError(MegabackError):
    """A source names no file or data set that can be found."""

    exit_code = 20


class SourceEmptyError(MegabackError):
    """A source contains no text."""

    exit_code = 21


class SourceUnreadableError(MegabackError):
    """A source file exists but cannot be read: truncated, corrupt or not permitted."""

    exit_code = 22


class BadRecordError(MegabackError):
    """One record of a source is malformed; the message names the file and the line or row."""

    exit_code = 23

    def __init__(
        self, message: str, cause: str = "malformed", place: str = "", number: int = 1
    ) -> None:
        """`cause`: kind of fault, under which records are counted; `place`: file and line or row.

        `number`: records that have the fault.
        """
        super().__init__(message)
        self.cause = cause
        self.number = number
        self.place = place or message.partition("; ")[0]


class TokenizerError(MegabackError):
    """A tokenizer cannot be trained or read, or lacks pieces that megaback needs."""

    exit_code = 24


class ShardsMissingError(MegabackError):
    """A folder is not a finished set of shards: it has no manifest."""

    exit_code = 30


class ShardCorruptError(MegabackError):
    """A shard or manifest is truncated, altered or fails a checksum."""

    exit_code = 31


class TokenizerMismatchError(MegabackError):
    """Two artifacts that must share a tokenizer were made with different ones."""

    exit_code = 32


class DirectionMismatchError(MegabackError):
    """Two artifacts that must agree on direction or unit do not."""

    exit_code = 33


class CheckpointMissingError(MegabackError):
    """A complete checkpoint is needed and there is none."""

    exit_code = 40


class CheckpointCorruptError(MegabackError):
    """Checkpoints exist, but none of them verifies."""

    exit_code = 41


class RunMismatchError(MegabackError):
    """A run cannot be resumed with this config or on this number of ranks."""

    exit_code = 42


class PromptError(MegabackError):
    """A prompt is longer than the model's context, or cannot be used with this model."""

    exit_code = 43


class OutputExistsError(MegabackError):
    """The output path already exists; nothing was overwritten."""

    exit_code = 44


class NonFiniteError(MegabackError):
    """The loss, the gradient norm or a model's logits became non-finite."""

    exit_code = 50


class RankLostError(MegabackError):
    """A rank died, froze or lost its connection; the others stopped. The run can be resumed."""

    exit_code = 51


class PreflightError(MegabackError):
    """A node differs from the others before the first step; the message names it."""

    exit_code = 52


class SupersededError(MegabackError):
    """A newer start of the run has begun, and this one ended without writing anything more."""

    exit_code = 53


class DeviceMemoryError(MegabackError):
    """A device ran out of memory during work that was planned to fit."""

    exit_code = 54


class ServeError(MegabackError):
    """A server cannot be started (its address is in use, or public without a token), or asked."""

    exit_code = 60


class StorageError(MegabackError):
    """The operating system refused a read or write: disk full, read-only, not permitted."""

    exit_code = 74


class PreemptedError(MegabackError):
    """The run saved after a stop signal and can be requeued (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class UserInterruptError(MegabackError):
    """Ended by Ctrl-C (SIGINT) with nothing to save, or by a second Ctrl-C."""

    exit_code = 130
