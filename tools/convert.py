"""`megaback convert`: exports a checkpoint of any ZeRO stage: full, Hugging Face, GGUF or PEFT.

Weights are read and written one tensor at a time, and the folder is renamed to its final name once
it is complete.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.common.command import WorkCommand, examples, with_options
from data_pipeline.common.next_command import show_next
from data_pipeline.common.number_ranges import COUNT, TWO_OR_MORE
from data_pipeline.common.output_folder import require_output_folder, whole_folder
from data_pipeline.common.output_paths import overwrite_option
from data_pipeline.common.shared_options import out_folder_option
from data_pipeline.common.terminal import echo
from data_pipeline.errors import MegabackError
from data_pipeline.text.codec import Direction
from megaback.run_folder import ADAPTER_NAME, CHECKPOINTS_FOLDER
from megaback.use_commands import use_commands
from tools.model_options import (
    GGUF_DTYPES,
    device_option,
    direction_option_named,
    stored_dtype_option,
)

if TYPE_CHECKING:
    from megaback.weights.source import WeightSource

# Not pydantic.ByteSize, which reads "1,5GB" as one byte and ignores text after the unit.
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MAX_FILE_BYTES = 5 * 10**9


def _num_bytes(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    num_bytes = float(match[1]) * _FACTORS[match[2].upper()] if match else 0
    if COUNT.problem(num_bytes):
        raise click.BadParameter(f"{text!r} is not a size; write for example 500MB or 5GB")
    return int(num_bytes)


max_shard_size_option = click.option(
    "--max-shard-size",
    callback=_num_bytes,
    default="5GB",
    show_default=True,
    help="Maximum size of a weight file in safetensors.",
)


def _license_id(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> str | None:
    if text is not None and not _LICENSE.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is not an identifier of the hub's licenses; write for example apache-2.0"
        )
    return text


def convert(
    source_path: Path,
    out: Path,
    kind: str,
    dtype: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    overwrite: bool = False,
    direction: Direction | None = None,
    license_id: str | None = None,
    base: Path | None = None,
) -> None:
    """Export a run, one of its checkpoints, or a converted model as `full`, `hf`, `gguf` or `peft`.

    `base`: an export of the base, of an adapter of PEFT that is merged with it, or for `peft`.
    Raises CheckpointMissingError, CheckpointCorruptError, OutputExistsError, BackendError,
    RunMismatchError, OSError.
    """
    _require_out(out, [source_path, *([] if base is None else [base])], overwrite=overwrite)
    source = _source_of(source_path, base)
    _write(
        source,
        out,
        kind,
        dtype,
        max_file_bytes,
        overwrite=overwrite,
        direction=direction,
        license_id=license_id,
        base=base,
    )


def _source_of(path: Path, base: Path | None) -> "WeightSource":
    """A source with the val loss in bits per byte too, or an adapter merged with its base.

    Raises the errors of `open_source` and `merged_with`.
    """
    from megaback.weights.identity import description_of, identity_of
    from megaback.weights.peft_adapter import merged_with
    from megaback.weights.source import open_source
    from tools.export.val_losses import with_val_bits_per_byte

    if base is not None and (path / ADAPTER_NAME).is_file():
        return merged_with(path, open_source(base), identity_of(description_of(base)))
    return with_val_bits_per_byte(open_source(path), path)


def _require_out(out: Path, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Checked before the slow imports. The output may be in a run's folder, not in its checkpoints.

    Raises OutputExistsError.
    """
    checkpoints = [path / CHECKPOINTS_FOLDER for path in paths]
    inputs = [one if one.is_dir() else path for one, path in zip(checkpoints, paths, strict=True)]
    require_output_folder(out, inputs, overwrite=overwrite)


def _write(
    source: "WeightSource",
    out: Path,
    kind: str,
    dtype: str,
    max_file_bytes: int,
    *,
    overwrite: bool,
    direction: Direction | None,
    license_id: str | None,
    base: Path | None = None,
) -> None:
    import torch

    from megaback.weights.model_folder import write_model_folder
    from tools.export.gguf import write_gguf_folder
    from tools.export.hf import write_hf_folder
    from tools.export.peft import require_same_base, write_peft_folder

    if direction is not None:
        text_format = source.description.text_format.using(direction, "the model")
        source = replace(source, description=replace(source.description, text_format=text_format))
    name = out.resolve().name
    with whole_folder(out, overwrite=overwrite) as folder:
        if kind == "gguf":
            for one in write_gguf_folder(folder, name, source, dtype, license_id):
                echo(f"{dtype}: rows are no multiple of its block, so another type: {one}")
            return
        torch_dtype: torch.dtype = getattr(torch, dtype)
        if kind == "peft":
            assert base is not None
            updates = require_same_base(source, base)
            write_peft_folder(folder, source, updates, base, torch_dtype, license_id)
        elif kind == "full":
            specs = source.specs(torch_dtype)
            write_model_folder(
                folder, source.description, specs, source.read, source.tokenizer, max_file_bytes
            )
        else:
            write_hf_folder(folder, name, source, torch_dtype, max_file_bytes, license_id)


def _average_of(
    paths: Sequence[Path], *, measures: bool, shards: str | None, device: str | None
) -> "WeightSource":
    """The mean of weights, with its val loss and that of the last path, both reported.

    Without `shards`, a val set that cannot be read is reported, and no error.
    """
    from megaback.weights.average import average_of

    average = average_of(paths)
    origin = average.description.average
    assert origin is not None
    for source in origin.sources:
        echo(
            f"average of  {source.path}, step {source.step}, SHA-256 {(source.sha256 or '-')[:12]}"
        )
    if not measures:
        return average
    from tools.export.val_losses import measure_val_losses

    try:
        losses = measure_val_losses(average, shards, device)
    except MegabackError as error:
        if shards is not None or device is not None:
            raise
        echo(f"val loss    not measured: {with_options(str(error))}")
        return average
    echo(f"val loss    {losses.sentence()}")
    return losses.in_description(average)


@click.command(
    cls=WorkCommand,
    name="convert",
    epilog=examples(
        "megaback convert runs/xcoax_100bt --out models/xcoax",
        "megaback convert runs/xcoax_100bt/checkpoints/best --to hf --dtype bfloat16 "
        "--out models/xcoax-hf",
        "megaback convert models/xcoax --to gguf --outtype q4_k_m --out models/xcoax-gguf",
        "megaback convert runs/xcoax_100bt --average-last 5 --out models/xcoax-mean",
        "megaback convert runs/lora --to peft --base models/base-hf --out adapters/lora",
        "megaback convert adapters/theirs --base models/base-hf --out models/merged",
        "megaback convert runs/a runs/b models/c --average --shards data/novels --out models/soup",
    ),
)
@click.argument(
    "checkpoints",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT...",
)
@click.option(
    "--to",
    "kind",
    type=click.Choice(["full", "hf", "gguf", "peft"]),
    default="full",
    show_default=True,
    help="Format: full is megaback's own, hf is for transformers, gguf for llama.cpp, and peft is "
    "the adapter of a run with LoRA alone.",
)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Export of the base by --to hf: of a run with LoRA, for --to peft, or of an adapter of "
    "PEFT that is CHECKPOINT, to merge them.",
)
@out_folder_option
@overwrite_option
@direction_option_named(
    "--direction", "Direction in which hf and gguf use a model of both. Default: backward."
)
@stored_dtype_option
@max_shard_size_option
@click.option(
    "--average",
    "is_average",
    is_flag=True,
    help="Export the mean of the weights of all CHECKPOINTs.",
)
@click.option(
    "--average-last",
    type=TWO_OR_MORE.option,
    metavar="N",
    help="Export the mean of the weights of the run's last N checkpoints.",
)
@click.option(
    "--val-loss/--no-val-loss",
    "measures",
    default=True,
    show_default=True,
    help="Measure the val losses of an average and of the last CHECKPOINT in it.",
)
@click.option(
    "--shards",
    type=click.Path(),
    help="Data set whose val set they are measured on. Default: that of the last one's run.",
)
@device_option
@click.option(
    "--license",
    "license_id",
    callback=_license_id,
    metavar="ID",
    help="License of the model, for the card of hf or gguf, as the hub names it: apache-2.0, mit.",
)
def main(
    checkpoints: tuple[Path, ...],
    kind: str,
    base: Path | None,
    out: Path,
    overwrite: bool,
    direction: Direction | None,
    dtype: str,
    max_shard_size: int,
    is_average: bool,
    average_last: int | None,
    measures: bool,
    shards: str | None,
    device: str | None,
    license_id: str | None,
) -> None:
    """Export CHECKPOINT (a run, one of its checkpoints, or a converted model) to a folder.

    RUN/checkpoints/best is the checkpoint with the lowest val loss, in a run with
    validation.patience. With --average, several are given, of one shape and tokenizer.
    """
    if direction is not None and kind in ("full", "peft"):
        raise click.UsageError(f"--direction is for hf and gguf; {kind} has every direction.")
    if license_id is not None and kind == "full":
        raise click.UsageError("--license is for the cards of hf, gguf and peft; full has none.")
    if dtype in GGUF_DTYPES and kind != "gguf":
        raise click.UsageError(f"--dtype {dtype} is for --to gguf; use float32 or bfloat16.")
    averages = is_average or average_last is not None
    if is_average and average_last is not None:
        raise click.UsageError("--average and --average-last exclude each other; give one.")
    if len(checkpoints) > 1 and not is_average:
        raise click.UsageError(
            f"{len(checkpoints)} CHECKPOINTs are exported only as their mean; add --average."
        )
    if kind == "peft" and (base is None or averages):
        raise click.UsageError("--to peft needs the --base of one CHECKPOINT.")
    is_adapter = (checkpoints[0] / ADAPTER_NAME).is_file()
    if base is not None and kind != "peft" and (averages or not is_adapter):
        raise click.UsageError("--base is for --to peft, or for an adapter of PEFT as CHECKPOINT.")
    if not averages and (shards is not None or device is not None):
        raise click.UsageError("--shards and --device are for the val loss of an average.")
    _require_out(out, [*checkpoints, *([] if base is None else [base])], overwrite=overwrite)
    from megaback.weights.average import last_checkpoints

    if averages:
        paths = checkpoints
        if average_last is not None:
            paths = tuple(last_checkpoints(checkpoints[0], average_last))
        source = _average_of(paths, measures=measures, shards=shards, device=device)
    else:
        source = _source_of(checkpoints[0], base)
    _write(
        source,
        out,
        kind,
        dtype,
        max_shard_size,
        overwrite=overwrite,
        direction=direction,
        license_id=license_id,
        base=base,
    )
    click.echo(f"wrote {out}")
    if kind in ("full", "hf"):
        from megaback.weights.model_folder import read_description

        made = read_description(out)
        show_next(use_commands(out, made.text_format.directions, on_examples=made.on_examples))


if __name__ == "__main__":
    main()
