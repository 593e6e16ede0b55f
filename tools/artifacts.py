"""Identification of a path: a data set, a shard, a tokenizer, a run, a checkpoint or a model.

Artifacts are distinguished by the files they contain, opened by their usual readers, and checked by
names and sizes or, on request, by hashes. Damaged ones raise their reader's error.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.build.finalize import unfinished_tasks
from data_pipeline.build.plan import PLAN_NAME, Plan
from data_pipeline.build.train_command import train_commands
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.limits import MAX_DICTIONARY_BYTES
from data_pipeline.common.next_command import command, free_path, override
from data_pipeline.common.regular_files import is_device, read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    MegabackError,
    ShardCorruptError,
    SourceMissingError,
)
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.inspection import data_set_facts
from data_pipeline.shards.manifest import (
    DICTIONARY_NAME,
    MANIFEST_NAME,
    SPLITS,
    shard_path,
)
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.sources.registry import BUILT_IN
from data_pipeline.sources.skipped import num_skipped
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAMES, find_tokenizer
from data_pipeline.tokenizer.train_tokenizer import REPORT_NAME
from megaback.faults.run_ownership import config_of_run
from megaback.run_folder import (
    BEST_NAME,
    CHECKPOINTS_FOLDER,
    CONFIG_COPY_NAME,
    GGUF_NAME,
    HF_TOKENIZER_CONFIG_NAME,
    LATEST_NAME,
    META_NAME,
    METRICS_NAME,
    MODEL_CONFIG_NAME,
    complete_checkpoints,
    meant_by,
)
from megaback.use_commands import use_commands
from tools.direction_gap.ladder_result import LADDER_NAME, read_ladder
from tools.direction_gap.result import JSON_NAME, read_summary
from tools.export.gguf_inspection import inspect_gguf
from tools.sweeps.record import RECORD_NAME, require_record
from tools.sweeps.result import result_of
from tools.sweeps.table import summary

if TYPE_CHECKING:
    from megaback.checkpoints.checkpoint import CheckpointMeta


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """An identified artifact, its facts, and the checks that it passed."""

    kind: str
    path: Path
    facts: Mapping[str, Any]
    checked: str
    """Description of the checks that passed."""
    next_lines: Mapping[str, str] = field(default_factory=dict)
    """Commands to type next, and their effects."""
    is_whole: bool = True
    """False for an unfinished artifact; a damaged one raises an error."""


def inspect(path: Path, *, verify: bool) -> Artifact:
    """Identify a path; with `verify`, also hash and decode its contents.

    Raises SourceMissingError for anything that is not megaback's, and the readers' errors.
    """
    if not path.exists():
        raise SourceMissingError(f"{path} does not exist; check the path")
    if path.is_file():
        return _inspect_file(path, verify)
    if is_device(path):
        raise SourceMissingError(
            f"{path} is a device, a pipe or a socket, which megaback never writes; name a file "
            "or a folder"
        )
    if not any(path.iterdir()):
        raise SourceMissingError(f"{path} is an empty folder; check the path")
    for name, look in _FOLDERS.items():
        if (path / name).exists():
            return look(path, verify)
    raise SourceMissingError(
        f"{path} holds nothing that megaback wrote (none of {', '.join(_FOLDERS)}); "
        "name the folder of a data set, a tokenizer, a run, a checkpoint or a model"
    )


def _inspect_file(path: Path, verify: bool) -> Artifact:
    if path.name in TOKENIZER_NAMES or path.suffix in (".model", ".spm"):
        return _tokenizer(path, verify)
    if path.suffix == ".gguf":
        return _gguf(path, verify)
    if path.suffix == ".zst":
        return _shard(path, verify)
    if path.name in (BEST_NAME, LATEST_NAME, META_NAME):
        return _checkpoint(path.parent if path.name == META_NAME else path, verify)
    if path.name in (MANIFEST_NAME, CONFIG_COPY_NAME, JSON_NAME, LADDER_NAME, MODEL_CONFIG_NAME):
        return inspect(path.parent, verify=verify)
    raise SourceMissingError(
        f"{path} is not a file of megaback's; name a tokenizer's file, a shard, a .gguf or a folder"
    )


def _data_set(folder: Path, verify: bool) -> Artifact:
    if verify:
        verify_data_set(folder)
    data_set = DataSet.open(folder)
    manifest = data_set.manifest
    data_set.codec()
    data_set.require_dictionary()
    for entry in manifest.shards:
        path = shard_path(folder, entry)
        _require_size(path, entry.file_bytes, ShardCorruptError, "build them again")
    splits = {name: manifest.total(name) for name in SPLITS}
    kind = "data set" if manifest.row_tokens is None else "data set of instruction examples"
    return Artifact(
        kind=kind,
        path=folder,
        facts={
            **data_set_facts(folder, manifest),
            **splits,
            "excluded": manifest.excluded,
            "skipped": {kind: num_skipped(manifest.skipped, kind) for kind in manifest.skipped},
        },
        checked=f"{len(manifest.shards)} shards and the tokenizer, "
        + ("decoded and hashed" if verify else "by size; the tokenizer by its hash"),
        next_lines={
            command("shards", "inspect", folder): "lengths, entropy, documents",
            **train_commands(folder, manifest),
        },
    )


def _unfinished(folder: Path, _verify: bool) -> Artifact:
    plan = Plan.load(folder)
    missing = unfinished_tasks(plan, folder)
    return Artifact(
        kind="data set that is not finished",
        path=folder,
        facts={"tasks": plan.num_tasks, "not_done": len(missing)},
        checked=f"the plan; there is no {MANIFEST_NAME} yet",
        next_lines={command("shards", "build", "--out", folder): "does what is missing"}
        if missing
        else {command("shards", "finalize", folder): "finishes it"},
        is_whole=False,
    )


def _shard(path: Path, verify: bool) -> Artifact:
    beside = path.with_name(DICTIONARY_NAME)
    dictionary = read_file(beside, MAX_DICTIONARY_BYTES) if beside.is_file() else None
    with ShardReader(path, dictionary) as reader:
        if verify:
            for frame in range(reader.num_frames):
                reader.frame(frame)
        header = reader.header
        facts = {**vars(header), "frames": reader.num_frames, "file_bytes": reader.file_bytes}
    return Artifact(
        kind="shard",
        path=path,
        facts=facts,
        checked="every frame, decoded" if verify else "its index",
        next_lines={command("inspect", path.parent): "its data set"}
        if (path.parent / MANIFEST_NAME).is_file()
        else {},
    )


def _tokenizer(path: Path, _verify: bool) -> Artifact:
    path = find_tokenizer(path) if path.is_dir() else path
    codec = TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)
    out = free_path(path.parent.parent / "shards")
    build = ("shards", "build", "--source", _source_of(path), "--tokenizer", path, "--out", out)
    return Artifact(
        kind="tokenizer",
        path=path,
        facts={
            "vocab_size": codec.vocab_size,
            "tokenizer_sha256": codec.format.tokenizer_sha256,
            "begin": codec.piece(codec.begin_id),
            "end": codec.piece(codec.end_id),
        },
        checked="it loads, and has the required control pieces",
        next_lines={command(*build): "uses it"},
    )


def _source_of(tokenizer: Path) -> str:
    """The source that a tokenizer was trained on, if it was one and still exists; else `novels`."""
    try:
        source = str(read_json(tokenizer.with_name(REPORT_NAME))["source"])
        is_there = source in BUILT_IN or "hf:" in source[:3] or Path(source).exists()
    except (OSError, ValueError, KeyError, TypeError):
        return "novels"
    return source if is_there and ", " not in source else "novels"


def _run(folder: Path, verify: bool) -> Artifact:
    from megaback.config_file import load_config
    from megaback.faults.run_state import assess_run
    from megaback.tracking.metrics import read_metrics

    config = load_config(config_of_run(folder))
    lines = read_metrics(folder) if (folder / METRICS_NAME).is_file() else []
    times = [line["step_s"] for line in lines if line.get("step_s") is not None]
    assessed = assess_run(folder, times, time.time())
    maximum = lines[-1]["step"] if lines else 0
    if assessed.rolled_back_to is not None:
        maximum = assessed.rolled_back_to
    facts: dict[str, Any] = {
        "config": f"{config.model.num_layers} layers, width {config.model.width}, "
        f"{config.data.description}, {config.data.direction.value}",
    }
    steps = [line for line in lines if line.get("loss") is not None and line["step"] <= maximum]
    if steps:
        facts |= {"step": steps[-1]["step"], "loss": steps[-1]["loss"]}
    facts["ended"] = assessed.ending or f"not yet ({assessed.state}: {assessed.reason})"
    following = {command("status", folder): "progress and history"}
    found = complete_checkpoints(folder)
    if not found:
        return Artifact(
            kind="run without a checkpoint",
            path=folder,
            facts=facts,
            checked="its config",
            next_lines=following,
        )
    newest = _checkpoint(found[-1], verify, folder)
    facts |= {"checkpoints": [target.name for target in found], "newest": newest.facts}
    return Artifact(
        kind="run",
        path=folder,
        facts=facts,
        checked=f"{found[-1].name}: {newest.checked}",
        next_lines={**following, **newest.next_lines},
    )


def _arrow(folder: Path, _verify: bool) -> Artifact:
    runs = sorted(folder.glob("seed-*/*ward"))
    line = command("plot", *runs)
    return Artifact(
        kind="arrow of time",
        path=folder,
        facts=read_summary(folder / JSON_NAME),
        checked=f"{JSON_NAME}, of {len(runs)} runs",
        next_lines={line: "their curves"} if runs else {},
    )


def _ladder(folder: Path, _verify: bool) -> Artifact:
    points, _ = read_ladder(folder / LADDER_NAME)
    return Artifact(
        kind="ladder of arrows of time",
        path=folder,
        facts={point.name: f"{point.whole.percent:+.2f}%" for point in points},
        checked=f"{LADDER_NAME}, of {len(points)} rungs",
        next_lines={
            command("inspect", folder / point.name): "its most expensive rung"
            for point in points[-1:]
        },
    )


def _sweep(folder: Path, _verify: bool) -> Artifact:
    result = result_of(require_record(folder), folder)
    return Artifact(
        kind="sweep",
        path=folder,
        facts={"keys": list(result.keys), "summary": summary(result)},
        checked=f"{RECORD_NAME}, of {len(result.runs)} runs",
        next_lines={command("sweep", folder): "its table and figure"},
    )


def _of_weights(path: Path, meta: "CheckpointMeta") -> dict[str, str]:
    """Commands that use a run or a checkpoint, and their effects."""
    run = path.parent.parent if path.parent.name == CHECKPOINTS_FOLDER else path
    name = run.resolve().name or "run"
    convert = command("convert", path, "--to", "full", "--out", free_path(Path("models") / name))
    lines = {
        **use_commands(path, meta.format.directions, on_examples=meta.on_examples),
        convert: "exports it",
    }
    config = config_of_run(run)
    if config.is_file() and meta.branch is None:  # init_from excludes branch_from
        other = override("run", free_path(run.with_name(f"{name}-2")))
        again = command("train", config, other, override("init_from", path))
        lines[again] = "start another run from it"
    return lines


def _checkpoint(path: Path, verify: bool, shown: Path | None = None) -> Artifact:
    """`shown`: path of the checkpoint in commands, if not `path`."""
    from megaback.checkpoints.checkpoint import find_checkpoint, read_meta

    path = meant_by(path)
    if not (path / META_NAME).is_file():
        raise CheckpointMissingError(
            f"{path} has no {META_NAME}: it is incomplete, or was deleted by rotation; name "
            "another checkpoint"
        )
    if verify:
        find_checkpoint(path)
    meta = read_meta(path)
    for name, (num_bytes, _) in meta.files.items():
        _require_size(path / name, num_bytes, CheckpointCorruptError, "name another checkpoint")
    facts = {
        "step": meta.step,
        "val_loss": meta.val_loss,
        **meta.text_format,
        "vocab_size": meta.vocab_size,
        "data_fingerprint": meta.data_fingerprint,
        "saved_by": f"{meta.world_size} ranks at ZeRO {meta.zero_stage}, {meta.precision}",
        "versions": meta.versions,
    }
    if meta.branch is not None:
        facts["branch_from"] = meta.branch.description
    if meta.imported is not None:
        facts["imported_from"] = meta.imported.shown
    return Artifact(
        kind="checkpoint",
        path=path,
        facts=facts,
        checked=f"{len(meta.files)} files, " + ("by their hashes" if verify else "by size"),
        next_lines=_of_weights(shown or path, meta),
    )


def _checkpoints(folder: Path, verify: bool) -> Artifact:
    found = complete_checkpoints(folder.parent)
    if not found:
        raise CheckpointMissingError(
            f"{folder} has no complete checkpoint; train until one is saved"
        )
    return _checkpoint(found[-1], verify)


def _model(folder: Path, verify: bool) -> Artifact:
    from megaback.weights.model_folder import open_weights, read_description, tokenizer_of

    description = read_description(folder)
    stored = open_weights(folder, description, verify=verify)
    if description.is_foreign:
        kind, checked = "model of another library", "its config and tokenizer"
    else:
        is_hf = (folder / HF_TOKENIZER_CONFIG_NAME).is_file()
        kind = "model for transformers (--to hf)" if is_hf else "model (--to full)"
        how = "by their hashes" if verify and not stored.changed else "by size"
        checked = f"{len(stored.names)} files of weights, {how}"
    codec = TextCodec.load_as(tokenizer_of(folder), description.text_format)
    description.text_format.require_same(codec.format, f"the model {folder}", "its tokenizer")
    shape, average, branch = description.shape, description.average, description.branch
    imported = description.imported
    return Artifact(
        kind=kind,
        path=folder,
        facts={
            "model": f"{shape.num_layers} layers, width {shape.width}, {shape.num_heads} heads",
            **description.text_format.to_dict(),
            "vocab_size": description.vocab_size,
            "context_tokens": description.context_tokens,
            "step": description.step,
            "val_loss": None if stored.changed else description.val_loss,
            "average_of": None if average is None else [one.path for one in average.sources],
            "branch_from": None if branch is None else branch.shown,
            "imported_from": None if imported is None else imported.shown,
            "changed": [f"{name} (by another program)" for name in stored.changed] or None,
        },
        checked=checked,
        next_lines={}
        if description.is_foreign
        else use_commands(
            folder, description.text_format.directions, on_examples=description.on_examples
        ),
    )


def _gguf(path: Path, verify: bool) -> Artifact:
    path = path / GGUF_NAME if path.is_dir() else path
    facts, checked = inspect_gguf(path, verify=verify)
    return Artifact(kind="model for llama.cpp (--to gguf)", path=path, facts=facts, checked=checked)


def _require_size(path: Path, expected_bytes: int, error: type[MegabackError], advice: str) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != expected_bytes:
        what = "is missing" if found is None else f"has {found:,} bytes, not {expected_bytes:,}"
        raise error(f"{path} {what}; restore it, or {advice}")


def _config_json(folder: Path, verify: bool) -> Artifact:
    try:
        read_json(folder / MODEL_CONFIG_NAME)
    except (OSError, ValueError):
        raise CheckpointCorruptError(
            f"{folder / MODEL_CONFIG_NAME} is truncated or corrupted; convert the model again"
        ) from None
    return _model(folder, verify)


# The file that identifies a folder, the most specific first.
_FOLDERS: dict[str, Callable[[Path, bool], Artifact]] = {
    MANIFEST_NAME: _data_set,
    META_NAME: _checkpoint,
    CONFIG_COPY_NAME: _run,
    JSON_NAME: _arrow,
    LADDER_NAME: _ladder,
    RECORD_NAME: _sweep,
    MODEL_CONFIG_NAME: _config_json,
    GGUF_NAME: _gguf,
    PLAN_NAME: _unfinished,
    CHECKPOINTS_FOLDER: lambda folder, verify: _checkpoints(folder / CHECKPOINTS_FOLDER, verify),
    LATEST_NAME: _checkpoints,
    **dict.fromkeys(TOKENIZER_NAMES, _tokenizer),
}
