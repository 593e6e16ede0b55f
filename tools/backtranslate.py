"""`megaback backtranslate`: generates instructions for texts, as examples for fine-tuning.

Results are stored in chunks in a work folder beside the output; after a kill, the same command
resumes. Tasks share the texts; the one that completes the last writes the output, whose bytes
depend on the texts, the models and the options, not on kills or on the number of tasks.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.build.options import text_column_option
from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.file_hash import file_sha256
from data_pipeline.common.locks import locked
from data_pipeline.common.number_ranges import (
    COUNT,
    MANY,
    MANY_OR_ZERO,
    NUMBER,
)
from data_pipeline.common.output_paths import (
    is_stream,
    is_vacant,
    overwrite_option,
    read_object,
    require_apart,
    writing_output,
)
from data_pipeline.common.regular_files import require_no_link
from data_pipeline.common.shared_options import limit_option
from data_pipeline.common.source_type import SOURCE
from data_pipeline.errors import (
    CheckpointMissingError,
    DirectionMismatchError,
    LaunchError,
    OutputExistsError,
)
from data_pipeline.redaction import place_of
from data_pipeline.sources.documents import Columns, Slice
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.sources.skipped import skipped_lines
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction
from megaback.run_folder import MODEL_CONFIG_NAME
from tools.backtranslation.example_selection import Choice, different_texts
from tools.backtranslation.proposals import BackTranslator, RoundTripScorer, Text
from tools.backtranslation.resumable_chunks import ResumableChunks
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    dtype_option,
    max_new_tokens_option,
    num_samples_option,
    seed_option,
    temperature_option,
    top_k_option,
)

if TYPE_CHECKING:
    import torch

PLAN_NAME = "plan.json"
OUTPUT_NAME = "output.json"
"""Name of the file in the work folder with the hashes of all outputs written from it."""
_FORMAT = {"format": "megaback-backtranslation", "version": 3}
_PROGRESS_INTERVAL_S = 10.0
_PLAN_DRAFT = re.compile(rf"\.{re.escape(PLAN_NAME)}\..*\.partial")


def work_folder(out: Path) -> Path:
    """The folder of results beside the output, which is kept."""
    return out.with_name(f"{out.name}.work")


def _require_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Create the work folder with this plan, or check that it has the same one.

    Raises OutputExistsError for another plan, and for a folder that has other files and no plan.
    """
    require_no_link(folder)
    path = folder / PLAN_NAME
    if not path.exists():
        is_foreign = (not folder.is_dir() and folder.exists()) or _has_other_files(folder)
        if is_foreign and not path.exists():  # else another task has just created it
            raise OutputExistsError(
                f"{folder}, the work folder, already holds something that this command did not "
                "write; choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=2) + "\n")
        return
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = {}
    for key in plan:
        if found.get(key) != plan[key]:
            raise OutputExistsError(
                f"{folder} was created with another {key}; use the same one, choose another --out, "
                "or remove that folder"
            )


def _inputs(pieces: Iterable[Slice]) -> list[dict[str, Any]]:
    """The inputs for the plan, with URLs stripped of secrets and signatures, which may change."""
    return [{**asdict(piece), "path": place_of(piece.path)} for piece in pieces]


def _converted(path: Path) -> Path:
    """The model folder of a run or a checkpoint; avoids importing torch if it is one already."""
    if (path / MODEL_CONFIG_NAME).is_file():
        return path
    from megaback.weights.converted import model_folder

    return model_folder(path)


def _require_output(out: Path, inputs: Iterable[str | Path | None]) -> None:
    """Check that the output is absent, or unchanged since written. Raises OutputExistsError."""
    if is_stream(out):
        raise OutputExistsError(
            f"--out {out} is not a regular file, which is needed to resume; name one"
        )
    require_apart(out, inputs)
    if not is_vacant(out) and (out.is_dir() or file_sha256(out) not in _written(out)):
        raise OutputExistsError(
            f"{out} holds something that this command did not write, or that was modified since; "
            "choose another --out"
        )


def _written(out: Path) -> list[str]:
    """Hashes of all outputs written from this work folder."""
    hashes = (read_object(work_folder(out) / OUTPUT_NAME) or {}).get("sha256")
    return hashes if isinstance(hashes, list) else []


def _has_other_files(folder: Path) -> bool:
    """Whether a work folder without a plan holds anything but locks and drafts of plans."""
    return folder.is_dir() and any(
        path.suffix != ".lock" and not _PLAN_DRAFT.fullmatch(path.name) for path in folder.iterdir()
    )


def _identity(model: Path) -> str:
    """Identity of a model folder: the hash of config.json, which has the hashes of weights."""
    try:
        return hashlib.sha256((model / MODEL_CONFIG_NAME).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise CheckpointMissingError(
            f"{model} holds no model: {MODEL_CONFIG_NAME} is missing; create one by "
            "`megaback convert`"
        ) from None


def _texts(
    pieces: tuple[Slice, ...], columns: Columns, limit: int | None, max_record_bytes: int
) -> Iterator[Text]:
    how: dict[str, Any] = {"max_record_bytes": max_record_bytes}
    documents = (document for piece in pieces for document in read_slice(piece, columns, **how))
    positions_and_texts = ((document.position, document.text) for document in documents)
    yield from islice(different_texts(positions_and_texts), limit)


def _load(
    folder: Path,
    forward: Path | None,
    device: "torch.device",
    dtype: "torch.dtype",
    cuda_graphs: bool,
    options: Any,
    count: int,
) -> BackTranslator:
    from megaback.inference.decoder import Decoder
    from megaback.weights.model_folder import load_model_folder

    model, description, codec = load_model_folder(folder, device, dtype)
    _require_direction(folder, codec.format.direction, Direction.BACKWARD)
    round_trip = None
    if forward is not None:
        judging, of_judge, its_codec = load_model_folder(forward, device, dtype)
        _require_direction(forward, its_codec.format.direction, Direction.FORWARD)
        round_trip = RoundTripScorer(judging, ChatFormat(its_codec), of_judge.context_tokens)
    decoder = Decoder(model, description.context_tokens, takes_over=False, cuda_graphs=cuda_graphs)
    return BackTranslator(
        model=model,
        decoder=decoder,
        form=ChatFormat(codec),
        round_trip=round_trip,
        options=options,
        count=count,
    )


def _require_direction(folder: Path, found: Direction, wanted: Direction) -> None:
    if found is not wanted:
        raise DirectionMismatchError(
            f"{folder} writes {found.value}, but a model that writes {wanted.value} is needed; "
            "name another"
        )


def _do_task(
    parts: ResumableChunks,
    task: int,
    num_tasks: int,
    texts: Iterator[Text],
    batch_size: int,
    translator: BackTranslator,
) -> None:
    """Generate the missing chunks of a task."""
    done = parts.resume(task)
    if done:
        click.echo(f"task {task} resumes after {done} chunks", err=True)
    chunks = iter(lambda: list(islice(texts, batch_size)), [])
    started = logged_s = time.monotonic()
    num_texts = 0
    for chunk in islice(chunks, task + done * num_tasks, None, num_tasks):
        parts.append(task, translator.records(chunk))
        num_texts += len(chunk)
        if time.monotonic() - logged_s > _PROGRESS_INTERVAL_S:
            logged_s = time.monotonic()
            line = {"event": "backtranslate", "task": task, "texts": num_texts}
            rate = {"texts_per_s": round(num_texts / (logged_s - started), 2)}
            click.echo(json.dumps({**line, "up_to": chunk[-1].position, **rate}), err=True)
    parts.finish(task)


def _merge(parts: ResumableChunks, choice: Choice, out: Path, overwrite: bool) -> None:
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    with writing_output(out, overwrite=overwrite or not is_vacant(out)) as file:
        for row in choice.examples(
            lambda: (record for chunk in parts.read_all() for record in chunk), counts
        ):
            line = json.dumps(row).encode() + b"\n"
            digest.update(line)
            file.write(line)
        found = digest.hexdigest()
        if not overwrite and not is_vacant(out) and file_sha256(out) != found:
            raise OutputExistsError(
                f"{out} was written with another --keep or --min-score; add --overwrite to replace "
                "it, or remove it"
            )
        hashes = list(dict.fromkeys([*_written(out), found]))
        write_text(work_folder(out) / OUTPUT_NAME, json.dumps({"sha256": hashes}) + "\n")
    texts, examples = counts.pop("texts", 0), counts.pop("examples", 0)
    click.echo(f"{out}: {examples:,} examples from {texts:,} texts")
    for why, count in sorted(counts.items()):
        click.echo(f"  excluded: {count:,} ({why})")


@click.command(
    cls=ResumableCommand,
    name="backtranslate",
    epilog=examples(
        "megaback backtranslate models/backchat --in texts.jsonl --out sft.jsonl",
        "megaback backtranslate models/backchat --in 'books/*.jsonl.zst' --out sft.jsonl "
        "-n 8 --keep 2 --forward models/answers",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--in",
    "source",
    type=SOURCE,
    required=True,
    help="Source of texts: a path, pattern, URL or hf:NAME.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File of JSON lines to write."
)
@overwrite_option
@text_column_option
@click.option(
    "--forward",
    type=click.Path(path_type=Path),
    help="Folder of a forward model, to score an instruction by how likely it makes its text. "
    "Default: score by the backward model.",
)
@num_samples_option(4, "Number of instructions to sample per text.")
@click.option(
    "--keep",
    type=COUNT.option,
    default=1,
    show_default=True,
    help="Maximum number of instructions to keep per text; those with the highest scores are kept.",
)
@click.option(
    "--min-score",
    type=NUMBER.option,
    help="Minimum score of an instruction, in nats per token; others are excluded. Default: none.",
)
@max_new_tokens_option(128, "instruction")
@temperature_option
@top_k_option
@seed_option
@limit_option("texts, the first ones")
@max_record_bytes_option
@click.option(
    "--batch-size",
    type=MANY.option,
    default=16,
    show_default=True,
    help="Number of texts per batch.",
)
@click.option(
    "--tasks",
    type=MANY.option,
    default=1,
    show_default=True,
    help="Number of tasks to split the texts into.",
)
@click.option(
    "--task-index",
    type=MANY_OR_ZERO.option,
    help="Index of the task to run, from 0. Default: all tasks.",
)
@device_option
@dtype_option
@cuda_graphs_option
def main(
    folder: Path,
    source: str,
    out: Path,
    overwrite: bool,
    text_column: str,
    forward: Path | None,
    num_samples: int,
    keep: int,
    min_score: float | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    limit: int | None,
    max_record_bytes: int,
    batch_size: int,
    tasks: int,
    task_index: int | None,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
) -> None:
    """Generate instructions for texts with the fine-tuned backward model in DIR.

    Run the same command again to resume. --keep and --min-score may be changed afterwards.
    """
    if task_index is not None and task_index >= tasks:
        raise click.UsageError(f"--task-index {task_index} is not less than --tasks {tasks}.")
    _require_output(out, (source, folder, forward))
    folder = _converted(folder)
    forward = None if forward is None else _converted(forward)
    columns = Columns(text_column)
    listing = list_source(source, columns, max_record_bytes=max_record_bytes)
    pieces = listing.slices
    for line in skipped_lines(listing.skipped):
        click.echo(line, err=True)
    plan = {
        **_FORMAT,
        "model": _identity(folder),
        "--forward": forward and _identity(forward),
        "--in": _inputs(pieces),
        "--text-column": text_column,
        "--limit": limit,
        "--num-samples": num_samples,
        "--max-new-tokens": max_new_tokens,
        "--temperature": temperature,
        "--top-k": top_k,
        "--seed": seed,
        "--batch-size": batch_size,
        "--tasks": tasks,
        "--dtype": dtype,
    }
    _require_plan(work_folder(out), plan)
    parts = ResumableChunks(work_folder(out), tasks)
    wanted = range(tasks) if task_index is None else [task_index]
    waiting = [task for task in wanted if not parts.is_done(task)]
    if waiting:
        from megaback.inference.placement import choose_device, choose_dtype
        from megaback.inference.sampling import SamplingOptions

        options = SamplingOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
        on = choose_device(device)
        translator = _load(
            folder, forward, on, choose_dtype(dtype, on), cuda_graphs, options, num_samples
        )
        for task in waiting:
            with locked(parts.lock_path(task), wait=False) as is_ours:
                if not is_ours:
                    raise LaunchError(
                        f"another process is running task {task} of {out}; wait for it, or stop it"
                    )
                texts = _texts(pieces, columns, limit, max_record_bytes)
                _do_task(parts, task, tasks, texts, batch_size, translator)
    missing = parts.missing
    if missing:
        click.echo(f"task {task_index} is done; {len(missing)} of {tasks} are still missing")
        return
    _merge(parts, Choice(keep, min_score), out, overwrite)


if __name__ == "__main__":
    main()
