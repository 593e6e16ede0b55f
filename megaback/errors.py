"""Exceptions that megaback raises: `except megaback.errors.MegabackError` catches all of them.

The message states what is wrong, where, and what to do. Commands exit with the exception's
`exit_code` (docs/exit_codes.md). Defined in `data_pipeline.errors`, the lowest layer.
"""

from data_pipeline.errors import BackendError as BackendError
from data_pipeline.errors import BadRecordError as BadRecordError
from data_pipeline.errors import BatchError as BatchError
from data_pipeline.errors import CheckpointCorruptError as CheckpointCorruptError
from data_pipeline.errors import CheckpointMissingError as CheckpointMissingError
from data_pipeline.errors import ConfigError as ConfigError
from data_pipeline.errors import DeviceMemoryError as DeviceMemoryError
from data_pipeline.errors import DirectionMismatchError as DirectionMismatchError
from data_pipeline.errors import LaunchError as LaunchError
from data_pipeline.errors import MegabackError as MegabackError
from data_pipeline.errors import NonFiniteError as NonFiniteError
from data_pipeline.errors import NotEnoughMemoryError as NotEnoughMemoryError
from data_pipeline.errors import OutputExistsError as OutputExistsError
from data_pipeline.errors import PreemptedError as PreemptedError
from data_pipeline.errors import PreflightError as PreflightError
from data_pipeline.errors import PromptError as PromptError
from data_pipeline.errors import RankLostError as RankLostError
from data_pipeline.errors import RunMismatchError as RunMismatchError
from data_pipeline.errors import ServeError as ServeError
from data_pipeline.errors import ShardCorruptError as ShardCorruptError
from data_pipeline.errors import ShardsMissingError as ShardsMissingError
from data_pipeline.errors import SourceEmptyError as SourceEmptyError
from data_pipeline.errors import SourceMissingError as SourceMissingError
from data_pipeline.errors import SourceUnreadableError as SourceUnreadableError
from data_pipeline.errors import StorageError as StorageError
from data_pipeline.errors import SupersededError as SupersededError
from data_pipeline.errors import TokenizerError as TokenizerError
from data_pipeline.errors import TokenizerMismatchError as TokenizerMismatchError
from data_pipeline.errors import UserInterruptError as UserInterruptError
