"""GPTs that write backwards: generation, scoring, infill, data loading and metrics.

`__all__` is the public API, documented in docs/python.md. Its modules, and torch, are imported when
a name is first used, so that `import megaback` is cheap.
"""

from megaback import own_process

if own_process.is_own_process():
    own_process.put_packages_first()
    own_process.end_at_ctrl_c()
    own_process.skip_collections_at_exit()

import importlib
from typing import TYPE_CHECKING

from megaback.installation import require_packages

if TYPE_CHECKING:
    from megaback import errors as errors
    from megaback.client.writer import RemoteWriter as RemoteWriter
    from megaback.client.writer import remote as remote
    from megaback.dataset import RowDataset as RowDataset
    from megaback.dataset import open_dataset as open_dataset
    from megaback.inference.chat import Candidate as Candidate
    from megaback.inference.chat import Chat as Chat
    from megaback.inference.chat import load_chat as load_chat
    from megaback.inference.completion import Completer as Completer
    from megaback.inference.infill.infiller import Infill as Infill
    from megaback.inference.infill.infiller import Infiller as Infiller
    from megaback.inference.infill.infiller import InfillOptions as InfillOptions
    from megaback.inference.infill.infiller import load_infiller as load_infiller
    from megaback.inference.sampling import SamplingOptions as SamplingOptions
    from megaback.inference.text_writer import Writer as Writer
    from megaback.inference.text_writer import load as load
    from megaback.scoring.pairs import Pair as Pair
    from megaback.scoring.scorer import Score as Score
    from megaback.scoring.scorer import Scorer as Scorer
    from megaback.scoring.scorer import load_scorer as load_scorer
    from megaback.tracking.metrics import read_metrics as read_metrics

__version__ = "0.1.0"

_MODULES = {
    "Candidate": "megaback.inference.chat",
    "Chat": "megaback.inference.chat",
    "Completer": "megaback.inference.completion",
    "Infill": "megaback.inference.infill.infiller",
    "InfillOptions": "megaback.inference.infill.infiller",
    "Infiller": "megaback.inference.infill.infiller",
    "Pair": "megaback.scoring.pairs",
    "RemoteWriter": "megaback.client.writer",
    "RowDataset": "megaback.dataset",
    "SamplingOptions": "megaback.inference.sampling",
    "Score": "megaback.scoring.scorer",
    "Scorer": "megaback.scoring.scorer",
    "Writer": "megaback.inference.text_writer",
    "load": "megaback.inference.text_writer",
    "load_chat": "megaback.inference.chat",
    "load_infiller": "megaback.inference.infill.infiller",
    "load_scorer": "megaback.scoring.scorer",
    "open_dataset": "megaback.dataset",
    "read_metrics": "megaback.tracking.metrics",
    "remote": "megaback.client.writer",
}
__all__ = [
    "Candidate",
    "Chat",
    "Completer",
    "Infill",
    "InfillOptions",
    "Infiller",
    "Pair",
    "RemoteWriter",
    "RowDataset",
    "SamplingOptions",
    "Score",
    "Scorer",
    "Writer",
    "errors",
    "load",
    "load_chat",
    "load_infiller",
    "load_scorer",
    "open_dataset",
    "read_metrics",
    "remote",
]

require_packages()


if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        """The public name, from the module that defines it (PEP 562)."""
        if name == "errors":
            return importlib.import_module("megaback.errors")
        if name not in _MODULES:
            raise AttributeError(f"module 'megaback' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
