"""Shared fixtures: shards of a real build, a small data set, checkpoints."""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_pipeline.build import plan
from data_pipeline.build.command import build_shards
from data_pipeline.common import process_pool
from tests.helpers.batches import CHECKPOINT_TOKENIZER, DataSet, some_shards, write_data_set
from tests.helpers.builds import (
    EMPTY_DOCUMENTS,
    HARD_TEXTS,
    Codecs,
    hashes,
    make_settings,
    write_source,
)
from tests.helpers.file_server import FileServer, serving

if TYPE_CHECKING:
    from torch import Tensor

    from megaback.checkpoints.checkpoint import CheckpointMeta
    from megaback.distributed.world import World

_LARGEST_FILE_BYTES = 1 << 16


@pytest.fixture(scope="session")
def source_texts(english_documents: list[str]) -> list[str]:
    """Documents, some of them difficult or empty, 50 of them duplicated."""
    empty = [""] * EMPTY_DOCUMENTS
    return [*english_documents[:250], *HARD_TEXTS, *empty, *english_documents[200:250]]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Path:
    """A source of six files; tests only read it."""
    return write_source(tmp_path_factory.mktemp("build") / "source", source_texts)


@pytest.fixture
def a_task_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files would all be one task."""
    monkeypatch.setattr(plan, "_SMALLEST_TASK_BYTES", 1)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build in this process, for tests that need no workers, which take a second to start."""

    def threads(workers: int, **_options: object) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(process_pool, "ProcessPoolExecutor", threads)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, source: Path, codec: Codecs
) -> Iterator[Path]:
    """Folder of an uninterrupted build; tests only read it."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_SMALLEST_TASK_BYTES", 1)
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    before = hashes(out)
    yield out
    assert hashes(out) == before


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder that tests may damage."""
    return Path(shutil.copytree(finished, tmp_path / "shards"))


@pytest.fixture
def small(tmp_path: Path) -> DataSet:
    return write_data_set(tmp_path, some_shards())


@pytest.fixture(scope="module")
def running() -> Iterator[FileServer]:
    """A file server for the tests of a module."""
    with serving() as server:
        yield server


@pytest.fixture
def server(running: FileServer) -> FileServer:
    """The module's server, reset: no files, faults or recorded requests."""
    running.forget()
    return running


@pytest.fixture(scope="module")
def world() -> "Iterator[World]":
    """One rank, with a real process group."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from megaback.distributed.world import World

    excepthook = sys.excepthook  # which PyTorch replaces for a process group
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()
    sys.excepthook = excepthook


@pytest.fixture(scope="session")
def meta_at() -> "Callable[..., CheckpointMeta]":
    """`meta_at(step, val_loss)`: metadata of a checkpoint."""
    from megaback.checkpoints.checkpoint import CheckpointMeta

    def make(step: int, val_loss: float | None = 1.5) -> CheckpointMeta:
        return CheckpointMeta(
            step=step,
            updates=step - 1,
            world_size=1,
            zero_stage=2,
            precision="fp32",
            vocab_size=600,
            text_format={"direction": "backward", "unit": "token", "tokenizer_sha256": "ab" * 32},
            data_fingerprint="cd" * 32,
            config={"run": "run"},
            val_loss=val_loss,
            versions={"torch": "2"},
            files={},
        )

    return make


@pytest.fixture(scope="session")
def state_at() -> "Callable[[int], dict[str, Tensor]]":
    """`state_at(step)`: weights, and moments that exceed the limit of `full_disk`."""
    import torch

    def make(step: int) -> "dict[str, Tensor]":
        return {
            "weight:a:0": torch.full((10,), float(step)),
            "exp_avg:a:0": torch.full((_LARGEST_FILE_BYTES // 3,), -float(step)),
        }

    return make


@pytest.fixture(scope="module")
def save(
    world: "World",
    meta_at: "Callable[..., CheckpointMeta]",
    state_at: "Callable[[int], dict[str, Tensor]]",
) -> Callable[..., Path]:
    """`save(run, step, val_loss, **options of CheckpointSection)`: a complete checkpoint."""
    from megaback.checkpoints.saver import CheckpointSaver
    from megaback.config_operation import CheckpointSection

    def save(
        run: Path, step: int, val_loss: float | None = 1.5, keep_last: int = 10, **options: object
    ) -> Path:
        section = CheckpointSection.model_validate({"keep_last": keep_last, **options})
        saver = CheckpointSaver(run, CHECKPOINT_TOKENIZER, section, world)
        saver.begin(state_at(step), meta_at(step, val_loss))
        saver.finish()
        return run / "checkpoints" / f"step-{step:08d}"

    return save


@pytest.fixture(scope="session")
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` writing small files works, and large ones fail midway."""

    @contextmanager
    def limit() -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE_BYTES, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory, english_documents: list[str]) -> Path:
    """A Llama of random weights with a byte-level tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("foreign")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<user>", "<answer>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(english_documents[:100], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<answer>"],
    )
    tokenizer.chat_template = (
        "<s>{% for m in messages %}<user>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<answer>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
