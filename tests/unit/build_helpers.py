"""What the tests of building shards work with: a source, its settings, and a folder's hashes."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_pipeline.tasks import BuildSettings
from data_pipeline.text import TextCodec

Codecs = Callable[..., TextCodec]
Run = Callable[..., subprocess.CompletedProcess[str]]

EMPTY_DOCUMENTS = 3
HARD_TEXTS = [
    " ",
    "\n",
    "\x00",
    "\ud800 and \udfff",
    "<|endoftext|><|im_start|>",
    "\u2581 \u2581\u2581",
    "e\u0301\U0001f600\u4e2d\u6587",
    "  double  spaces\r\nand\ttabs ",
]


def write_source(folder: Path, texts: list[str], num_files: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::num_files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def make_settings(source: Path | str, codec: TextCodec, **changed: object) -> BuildSettings:
    settings = BuildSettings(
        source=str(source),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=codec.format.direction.value,
        unit=codec.format.unit.value,
        val_fraction=0.1,
        frame_tokens=256,
        shard_tokens=1500,
    )
    return replace(settings, **changed)


def hashes(folder: Path) -> dict[str, str]:
    """What a folder holds, file by file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
