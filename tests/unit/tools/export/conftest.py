"""Exports for transformers, shared by the tests of its code."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

ExportOf = Callable[..., Path]


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> ExportOf:
    """`export(direction, unit, context_tokens=64, qk_norm=False)`: an export folder."""

    @cache
    def of(
        direction: Direction = Direction.BACKWARD,
        unit: Unit = Unit.TOKEN,
        context_tokens: int = 64,
        **model: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("export")
        ours = codec(direction, unit)
        write_checkpoint(folder / "run", ours, context_tokens=context_tokens, **model)
        convert(folder / "run", folder / "model", "hf", "float32")
        return folder / "model"

    return of


@pytest.fixture(scope="session")
def hf(export: ExportOf) -> Path:
    """A backward Llama."""
    return export()


@pytest.fixture(scope="session")
def tokenizer(hf: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hf, trust_remote_code=True)


@pytest.fixture(scope="session")
def model(hf: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(hf)
