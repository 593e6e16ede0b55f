"""The one exception family of megaback, and its exit codes.

Every error that a user can cause is a `MegabackError` whose message says what is wrong, where, and
what to do. Each class has an exit code of its own, so that a script can tell them apart. The family
lives here because `data_pipeline` is the lowest layer: every other package may import it.
docs/exit_codes.md lists the codes for users; a test keeps the two equal.
"""

from typing import ClassVar

from data_pipeline.redaction import scrub


class MegabackError(Exception):
    """Something that the user can act on, said in one sentence.

    No sentence holds a secret of an address, whatever it was made of: they are kept in records and
    logs, and quote what drivers say.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(scrub(one) if isinstance(one, str) else one for one in arguments))


class ConfigError(MegabackError):
    """A config has an unknown key, a value out of range, or values that contradict each other."""

    exit_code = 10


class BatchError(ConfigError):
    """The global batch cannot be divided among the ranks, lanes or micro-batches asked for."""

    exit_code = 11


class BackendError(MegabackError):
    """An attention backend, device, precision, library or program that is needed is not there."""

    exit_code = 12


class LaunchError(MegabackError):
    """Ranks could not be started, or died without a reason of their own."""

    exit_code = 13


class NotEnoughMemoryError(MegabackError):
    """A run needs more memory than the devices have that it is to have; what would fit is named."""

    exit_code = 14


class SourceMissingError(MegabackError):
    """A source names no file or data set that can be found."""

    exit_code = 20


class SourceEmptyError(MegabackError):
    """A source was read and holds no text."""

    exit_code = 21


class SourceUnreadableError(MegabackError):
    """A source file is there, but is not what its name says: truncated, corrupt, not permitted."""

    exit_code = 22


class BadRecordError(MegabackError):
    """One record of a source is malformed; the message names the file and the line or row."""

    exit_code = 23

    def __init__(
        self, message: str, cause: str = "malformed", place: str = "", number: int = 1
    ) -> None:
        """`cause` is the kind of fault, under which such records are counted; `place` is where.

        `number` is of how many records it is true.
        """
        super().__init__(message)
        self.cause = cause
        self.number = number
        self.place = place or message.partition("; ")[0]


class TokenizerError(MegabackError):
    """A tokenizer cannot be trained, read, or lacks pieces that megaback needs."""

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
    """No complete checkpoint is where one is needed."""

    exit_code = 40


class CheckpointCorruptError(MegabackError):
    """Checkpoints are there, but none of them verifies."""

    exit_code = 41


class RunMismatchError(MegabackError):
    """A run cannot be continued with this config or on this number of ranks."""

    exit_code = 42


class PromptError(MegabackError):
    """A prompt is longer than the model's context, or cannot be used with this model."""

    exit_code = 43


class OutputExistsError(MegabackError):
    """An output path already holds something else; nothing was overwritten."""

    exit_code = 44


class NonFiniteError(MegabackError):
    """The loss, the gradient norm or a model's logits became NaN or infinite."""

    exit_code = 50


class RankLostError(MegabackError):
    """A rank died, froze or was cut off; the others have stopped. The run can be started again."""

    exit_code = 51


class PreflightError(MegabackError):
    """Before the first step, a node was found that does not fit the others; it is named."""

    exit_code = 52


class ServeError(MegabackError):
    """A server cannot be started: its address is taken, or open to others without a token."""

    exit_code = 60


class StorageError(MegabackError):
    """The operating system refused a read or a write: disk full, read-only, not permitted."""

    exit_code = 74


class PreemptedError(MegabackError):
    """The run was asked to stop, saved, and can be requeued (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75


class UserInterruptError(MegabackError):
    """Ended by Ctrl-C (SIGINT), where nothing was there to save, or a second time."""

    exit_code = 130
