"""TensorBoard tracker: event files in `tensorboard`, one event per line of metrics.jsonl.

Each start begins a file, whose first event makes TensorBoard discard later steps of earlier files.
"""

import html
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from megaback.run_folder import TENSORBOARD_FOLDER
from megaback.tracking.tracker import BEFORE_ALL_STEPS, Value

_FLUSH_S = 20
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+.!|-]")
_RECORD_HEADER = struct.Struct("<QI")  # TFRecord: length, its checksum; data, its checksum
_CHECKSUM_BYTES = 4


class TensorboardTracker:
    """Writes numbers as scalars, and samples as a table of text; other texts are omitted."""

    def __init__(self, run: Path, last_step: int) -> None:
        """Raises OSError."""
        folder = run / TENSORBOARD_FOLDER
        # After a kill the last step may be incomplete, so it is written again.
        self.held_step = max(min(_last_step(folder) - 1, last_step), BEFORE_ALL_STEPS)
        is_new = not any(folder.glob("events.*"))
        self._writer: Any = SummaryWriter(
            str(folder),
            purge_step=None if is_new else self.held_step + 1,
            flush_secs=_FLUSH_S,
        )

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        numbers = [
            Summary.Value(tag=tag, simple_value=float(value))
            for tag, value in values.items()
            if not isinstance(value, str)
        ]
        self._writer.file_writer.add_summary(Summary(value=numbers), step)

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        lines = ["|given|text|", "|:--|:--|"]
        lines += [f"|{_as_cell(given)}|{_as_cell(text)}|" for given, text in texts]
        self._writer.add_text("samples", "\n".join(lines), step)

    def close(self) -> None:
        self._writer.close()


def _as_cell(text: str) -> str:
    """A text as it is, in a cell of a table in Markdown."""
    escaped = _MARKDOWN.sub(r"\\\g<0>", text)
    return "<br>".join(html.escape(escaped, quote=False).splitlines())


def _last_step(folder: Path) -> int:
    """The last step that TensorBoard shows, or BEFORE_ALL_STEPS."""
    last = BEFORE_ALL_STEPS
    for path in sorted(folder.glob("events.*")):
        for event in _events(path):
            if event.HasField("summary"):
                last = max(last, event.step)
            elif event.session_log.status == SessionLog.START:
                last = min(last, event.step - 1)
    return last


def _events(path: Path) -> Iterator[Event]:
    """The events of a file, up to the first incomplete one."""
    with path.open("rb") as file:
        while len(header := file.read(_RECORD_HEADER.size)) == _RECORD_HEADER.size:
            num_bytes, _ = _RECORD_HEADER.unpack(header)
            content = file.read(num_bytes)
            if len(file.read(_CHECKSUM_BYTES)) < _CHECKSUM_BYTES:
                return
            try:
                event = Event.FromString(content)
            except DecodeError:  # a crash of the machine may leave any bytes
                return
            yield event
