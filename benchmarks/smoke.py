"""Smoke mode of the benchmarks: `python benchmarks/NAME.py --smoke` checks that one runs.

A smoke run is the benchmark itself with small sizes and synthetic data. Nothing that it prints is a
measurement, so every digit is masked.
"""

import inspect
import json
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.common.command import Command

if TYPE_CHECKING:
    from data_pipeline.text.codec import Direction

_VOCAB_SIZE = 600
_CONTEXT_TOKENS = 256
_FRAME_TOKENS = 1024
_NUM_DOCUMENTS = 300
_NUM_ROWS = 90
_END = b"\0\n"
"""End of a benchmark's output: a helper of multiprocessing keeps the pipe open after it."""


class Benchmark(Command):
    """A command with `--smoke`. `smoke` is the command line of a smoke run.

    Placeholders such as `{shards}` become synthetic inputs: see the functions of `_MAKERS`.
    """

    def __init__(self, *args: Any, smoke: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self._smoke = smoke
        self.params.append(
            click.Option(
                ["--smoke"],
                is_flag=True,
                is_eager=True,  # required arguments are replaced
                expose_value=False,
                callback=self._start_smoke_run,
                help="Only check that it runs: synthetic data, small sizes, no figures.",
            )
        )

    def _start_smoke_run(self, context: click.Context, _option: object, is_asked: bool) -> None:
        if not is_asked or context.resilient_parsing:
            return
        assert self.callback is not None
        script = Path(inspect.getfile(self.callback)).absolute()
        with TemporaryDirectory(prefix="smoke-") as folder:
            made_up = MadeUp(Path(folder))
            words = [word.format_map(made_up) for word in self._smoke.split()]
            click.echo(
                f"smoke run of {script.name}: made-up data and small sizes, so every digit is "
                f"masked\n$ {script.name} {' '.join(words)}"
            )
            code = _run_masked(self, script, words, Path(folder))
        context.exit(code)


def _run_masked(benchmark: click.Command, script: Path, words: list[str], folder: Path) -> int:
    """Run a benchmark, whose output a fork of this process prints without digits.

    Returns the exit code of the benchmark.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(writing)
            _mask(reading)
        finally:
            os._exit(0)
    os.close(reading)
    usual = os.dup(1)
    os.dup2(writing, 1)
    os.close(writing)
    # Compiling kernels takes minutes; torch.compile is still called.
    os.environ |= {"TMPDIR": str(folder), "TORCHDYNAMO_DISABLE": "1"}
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tempfile.tempdir = None
    sys.argv = [str(script), *words]
    code = _exit_code(benchmark, words)
    sys.stdout.flush()
    os.write(1, _END)
    os.dup2(usual, 1)
    os.close(usual)
    os.waitpid(pid, 0)
    return code


def _mask(reading: int) -> None:
    """Print what is read, without digits, up to `_END`."""
    with os.fdopen(reading, "rb") as output:
        for line in output:
            click.echo(re.sub(rb"\d", b"#", line.removesuffix(_END)), nl=False)
            if line.endswith(_END):
                return


def _exit_code(benchmark: click.Command, words: list[str]) -> int:
    """Run a benchmark to its end; returns the exit code that its process would have."""
    try:
        benchmark.main(words)
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # noqa: BLE001 - the rest of its output is printed first
        traceback.print_exc()
        return 1
    if isinstance(code, str):
        click.echo(code, err=True)
        return 1
    return code or 0


def is_installed(peer: str, module: str) -> bool:
    """Whether a peer is installed; prints a line if it is not."""
    if find_spec(module):
        return True
    click.echo(f"{peer} is skipped: its module {module} is not installed")
    return False


class MadeUp(dict[str, str]):
    """Paths of a smoke run's inputs, each made at its first use."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> str:
        path = self.folder / name
        self[name] = str(_MAKERS[name](self, path) or path)
        return self[name]


def _documents(seed: int) -> list[str]:
    """Synthetic prose of invented words."""
    generator = random.Random(seed)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(400)]
    sentences = [" ".join(generator.choices(words, k=12)).capitalize() + "." for _ in range(2000)]
    return [" ".join(generator.choices(sentences, k=12)) for _ in range(_NUM_DOCUMENTS)]


def _text(_: MadeUp, path: Path) -> None:
    path.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in _documents(1)]
    (path / "a.jsonl").write_text("".join(lines), encoding="utf-8")


def _file(made_up: MadeUp, _: Path) -> Path:
    return Path(made_up["text"]) / "a.jsonl"


def _rows(_: MadeUp, path: Path) -> Path:
    seed = 3 if path.name == "rows_val" else 2
    texts = [text.split(".") for text in _documents(seed)[:_NUM_ROWS]]
    rows = [{"instruction": f"Why{parts[1]}?", "output": f"{parts[2]}."} for parts in texts]
    for row, parts in zip(rows[::3], texts, strict=False):
        row["instruction"] = f"Define the noun '{parts[0].split()[-1]}'."
    file = path.with_suffix(".jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _tokenizer(made_up: MadeUp, path: Path) -> Path:
    from data_pipeline.text.tokenizer import TOKENIZER_NAME
    from data_pipeline.tokenizer.train_tokenizer import train_tokenizer

    train_tokenizer(made_up["text"], path, _VOCAB_SIZE)
    return path / TOKENIZER_NAME


def _tokenizer_json(_: MadeUp, path: Path) -> Path:
    """Byte-level BPE with GPT-2's splits."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_documents(1), vocab_size=_VOCAB_SIZE, show_progress=False)
    file = path.with_suffix(".json")
    tokenizer.save(str(file))
    return file


def _build(made_up: MadeUp, path: Path, val_fraction: float) -> None:
    from data_pipeline.build.command import build_shards
    from data_pipeline.build.settings import BuildSettings
    from data_pipeline.sources.weighted import WeightedSource
    from data_pipeline.text.codec import Direction, TextCodec, Unit

    codec = TextCodec.load(Path(made_up["tokenizer"]), Direction.BACKWARD, Unit.TOKEN)
    settings = BuildSettings(
        sources=(WeightedSource(made_up["text"]),),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        val_fraction=val_fraction,
        frame_tokens=_FRAME_TOKENS,
    )
    build_shards(settings, codec, path, workers=1)


def _shards(made_up: MadeUp, path: Path) -> None:
    _build(made_up, path, 0.1)


def _shards_without_val(made_up: MadeUp, path: Path) -> None:
    _build(made_up, path, 0.0)


def write_random_model(
    folder: Path, tokenizer: Path, direction: "Direction", layers: int, width: int, context: int
) -> None:
    """A model folder with random weights, scaled so that rounding decides no greedy token."""
    import torch

    from data_pipeline.text.codec import TextCodec, Unit
    from megaback.config import ModelSection
    from megaback.model.gpt import ReverseGPT
    from megaback.weights.model_folder import ModelDescription, write_model_folder

    codec = TextCodec.load(tokenizer, direction, Unit.TOKEN)
    shape = ModelSection(num_layers=layers, width=width, num_heads=max(width // 64, 1)).resolved()
    model = ReverseGPT(shape, codec.vocab_size)
    model.initialize(0)
    with torch.no_grad():
        model.lm_head.weight *= 20
    weights = dict(model.named_parameters())
    folder.mkdir()
    write_model_folder(
        folder,
        ModelDescription(
            shape=shape,
            vocab_size=codec.vocab_size,
            context_tokens=context,
            text_format=codec.format,
            step=0,
            val_loss=None,
        ),
        {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()},
        lambda name: weights[name].detach(),
        codec.model_bytes,
        1 << 30,
    )


def _model(made_up: MadeUp, path: Path) -> None:
    from data_pipeline.text.codec import Direction

    tokenizer = Path(made_up["tokenizer"])
    write_random_model(path, tokenizer, Direction(path.name), 1, 32, _CONTEXT_TOKENS)


def _config(_: MadeUp, path: Path) -> Path:
    """Config of a run of one process with thousands of parameters."""
    fields = {
        "run": "run",
        "data": {"shards": "shards"},
        "model": {"num_layers": 1, "width": 32, "num_heads": 2, "tie_embeddings": True},
        "batch": {"context_tokens": 512, "global_batch_rows": 4, "micro_batch_rows": 4},
        "optimizer": {"name": "muon", "learning_rate": 3e-3},
        "training": {"steps": 2, "precision": "fp32"},
        "zero": {"stage": 1},
        "hardware": {"device": "cpu", "processes": 1, "preflight": "off"},
        "logging": {"tensorboard": "off"},
    }
    file = path.with_suffix(".yaml")
    file.write_text(json.dumps(fields), encoding="utf-8")  # which YAML holds
    return file


def _nothing(_: MadeUp, _path: Path) -> None:
    """A path for what the benchmark writes."""


_MAKERS: dict[str, Callable[[MadeUp, Path], Path | None]] = {
    "text": _text,
    "file": _file,
    "rows": _rows,
    "rows_val": _rows,
    "tokenizer": _tokenizer,
    "tokenizer_json": _tokenizer_json,
    "shards": _shards,
    "shards_without_val": _shards_without_val,
    "forward": _model,
    "backward": _model,
    "config": _config,
    "out": _nothing,
}
