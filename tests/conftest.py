"""Shared fixtures: a small tokenizer, a small data set, and the command as a real process.

Everything is made from a seeded generator of English sentences: no network, no files from outside
the repository. All of it is session-wide, so tests must not write into these folders.
"""

import atexit
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from data_pipeline import redaction
from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from megaback.distributed.visible_devices import count_devices
from tests.helpers.process_state import changes, left_threads, process_state, running_threads
from tests.helpers.warm_start import use_warm_starts
from tests.helpers.wheel_environment import wheel_environment

# Models of the tests are so small that several threads take five times the CPU time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Size of the terminal that starts the tests; GNU readline also sets it for child processes.
for _name in ("COLUMNS", "LINES"):
    os.environ.pop(_name, None)

# transformers reads this once, and Python finds the code of exports only in the first such folder.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

# No deadlines, as machines are busy; no random examples, which are for `make fuzz-properties`.
settings.register_profile("megaback", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("fuzz", deadline=None)
settings.load_profile("megaback")


if not count_devices():  # a fork cannot use CUDA, nor another device than its template
    use_warm_starts()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    """Fail a file's last test where the file leaves state that later tests would depend on."""
    before, threads = process_state(), running_threads()
    yield
    left = [*changes(before), *left_threads(threads)]
    assert not left, "left to later tests:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def no_secret_is_known() -> Iterator[None]:
    """Forget secrets of a test's URLs, which would be redacted in the output of later tests."""
    yield
    redaction._known.clear()
    for name in list(os.environ):
        if name.startswith(redaction.VARIABLE_PREFIX):
            del os.environ[name]


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Seed the generators of the process: a draw must not depend on tests that ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def no_accelerate(nothing_is_left: None) -> Iterator[None]:
    """End Accelerate's state, which is the process's: with it, `open_dataset` needs a rank."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache folder in place of the user's, for commands too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


NUM_PIECES = 600
NUM_DOCUMENTS = 400
FRAME_TOKENS = 1024

_PEOPLE = [
    "the old captain",
    "a tired sailor",
    "my younger sister",
    "the harbour master",
    "an honest lawyer",
    "her neighbor",
    "the village doctor",
    "a stranger from the north",
    "the schoolteacher",
    "his uncle",
]
_DEEDS = [
    "remembered",
    "carried",
    "painted",
    "sold",
    "forgot",
    "described",
    "borrowed",
    "counted",
    "repaired",
    "followed",
    "had never seen",
    "could not find",
    "wanted to understand",
]
_THINGS = [
    "a broken lantern",
    "the long letter",
    "three white horses",
    "the garden wall",
    "an empty bottle",
    "that strange question",
    "the northern road",
    "a wooden clock",
    "some bread and cheese",
    "the last map",
]
_ENDINGS = [
    "before the rain began",
    "in the autumn of {year}",
    "because nobody else would",
    "on the second day",
    "while the children slept",
    "for {count} shillings",
    "near the river",
    "and said nothing about it",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units of work for the processes of `pytest -n`."""
    from tests.helpers.work_units import WorkUnits

    return WorkUnits(config, log)


def english_document(generator: random.Random) -> str:
    """A document of one to six sentences in one or two paragraphs."""
    sentences = []
    for _ in range(generator.randint(1, 6)):
        ending = generator.choice(_ENDINGS).format(
            year=generator.randint(1700, 1999), count=generator.randint(2, 99)
        )
        words = [generator.choice(choices) for choices in (_PEOPLE, _DEEDS, _THINGS)]
        sentences.append(f"{' '.join(words)} {ending}.".capitalize())
    cut = generator.randint(0, len(sentences) - 1)
    paragraphs = [" ".join(part) for part in (sentences[:cut], sentences[cut:]) if part]
    return "\n\n".join(paragraphs)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="session")
def english_documents() -> list[str]:
    """400 different documents, the same in every session."""
    generator = random.Random(20)
    return [f"{english_document(generator)} ({number})" for number in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="session")
def tiny_text_folder(
    tmp_path_factory: pytest.TempPathFactory, english_documents: list[str]
) -> Path:
    """A source: the documents in two jsonl files."""
    folder = tmp_path_factory.mktemp("text")
    half = NUM_DOCUMENTS // 2
    write_jsonl(folder / "a.jsonl", english_documents[:half])
    write_jsonl(folder / "b.jsonl", english_documents[half:])
    return folder


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory, tiny_text_folder: Path) -> Path:
    """A SentencePiece model of 600 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(str(tiny_text_folder), folder, NUM_PIECES)
    return folder / TOKENIZER_NAME


@pytest.fixture(scope="session")
def codec(tokenizer_path: Path) -> Callable[..., TextCodec]:
    """`codec(direction, unit)`: the small tokenizer's codec, backward by tokens by default."""

    @cache
    def make(direction: Direction = Direction.BACKWARD, unit: Unit = Unit.TOKEN) -> TextCodec:
        return TextCodec.load(tokenizer_path, direction, unit)

    return make


@pytest.fixture(scope="session")
def tiny_shards(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_text_folder: Path,
    codec: Callable[..., TextCodec],
) -> Path:
    """The documents as backward token shards in frames of 1,024, a tenth of them in the val set."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    settings = BuildSettings(
        sources=(WeightedSource(str(tiny_text_folder)),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0.1,
        frame_tokens=FRAME_TOKENS,
    )
    build_shards(settings, codec(), folder, workers=1)
    return folder


@pytest.fixture(scope="session")
def run_megaback() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_megaback(*args, **options of subprocess.run)`: the command as a process."""

    def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megaback", *map(str, args)]
        options = {"timeout": 120, "check": False, **options}
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


@pytest.fixture(scope="session")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with megaback from a wheel; one for all processes of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel"
    return wheel_environment(folder) / "bin" / "python"
