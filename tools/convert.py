"""`megaback convert`: exports a checkpoint of any ZeRO stage: full, Hugging Face or GGUF.

Weights are read and written one tensor at a time, and the folder is renamed to its final name once
it is complete.
"""

import re
from dataclasses import replace
from pathlib import Path

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.next_command import show_next
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.common.output_folder import require_output_folder, whole_folder
from data_pipeline.common.output_paths import overwrite_option
from data_pipeline.common.shared_options import out_folder_option
from data_pipeline.text.codec import Direction
from megaback.run_folder import CHECKPOINTS_FOLDER
from megaback.use_commands import use_commands
from tools.model_options import direction_option_named, stored_dtype_option

# Not pydantic.ByteSize, which reads "1,5GB" as one byte and ignores text after the unit.
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MAX_FILE_BYTES = 5 * 10**9


def _num_bytes(_context: click.Context, _parameter: click.Parameter, text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    num_bytes = float(match[1]) * _FACTORS[match[2].upper()] if match else 0
    if COUNT.problem(num_bytes):
        raise click.BadParameter(f"{text!r} is not a size; write for example 500MB or 5GB")
    return int(num_bytes)


def convert(
    source_path: Path,
    out: Path,
    kind: str,
    dtype: str,
    max_file_bytes: int = MAX_FILE_BYTES,
    *,
    overwrite: bool = False,
    direction: Direction | None = None,
) -> None:
    """Export a run, one of its checkpoints, or a converted model as `full`, `hf` or `gguf`.

    Raises CheckpointMissingError, CheckpointCorruptError, OutputExistsError, BackendError, OSError.
    """
    # Checked before the slow imports. The output may be in a run's folder, not in its checkpoints.
    checkpoints = source_path / CHECKPOINTS_FOLDER
    source_files = checkpoints if checkpoints.is_dir() else source_path
    require_output_folder(out, (source_files,), overwrite=overwrite)
    import torch

    from megaback.weights.model_folder import write_model_folder
    from megaback.weights.source import open_source
    from tools.export.gguf import write_gguf_folder
    from tools.export.hf import write_hf_folder

    source = open_source(source_path)
    if direction is not None:
        text_format = source.description.text_format.using(direction, f"{source_path}")
        source = replace(source, description=replace(source.description, text_format=text_format))
    torch_dtype: torch.dtype = getattr(torch, dtype)
    name = out.resolve().name
    with whole_folder(out, overwrite=overwrite) as folder:
        if kind == "full":
            specs = source.specs(torch_dtype)
            write_model_folder(
                folder, source.description, specs, source.read, source.tokenizer, max_file_bytes
            )
        elif kind == "hf":
            write_hf_folder(folder, name, source, torch_dtype, max_file_bytes)
        else:
            write_gguf_folder(folder, name, source, torch_dtype)


@click.command(
    cls=WorkCommand,
    name="convert",
    epilog=examples(
        "megaback convert runs/xcoax_100bt --out models/xcoax",
        "megaback convert runs/xcoax_100bt/checkpoints/best --to hf --dtype bfloat16 "
        "--out models/xcoax-hf",
        "megaback convert models/xcoax --to gguf --out models/xcoax-gguf",
    ),
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "kind",
    type=click.Choice(["full", "hf", "gguf"]),
    default="full",
    show_default=True,
    help="Format: full is megaback's own, hf is for transformers, gguf for llama.cpp.",
)
@out_folder_option
@overwrite_option
@direction_option_named(
    "--direction", "Direction in which hf and gguf use a model of both. Default: backward."
)
@stored_dtype_option
@click.option(
    "--max-shard-size",
    callback=_num_bytes,
    default="5GB",
    show_default=True,
    help="Maximum size of a weight file (full and hf).",
)
def main(
    checkpoint: Path,
    kind: str,
    out: Path,
    overwrite: bool,
    direction: Direction | None,
    dtype: str,
    max_shard_size: int,
) -> None:
    """Export CHECKPOINT (a run, one of its checkpoints, or a converted model) to a folder.

    RUN/checkpoints/best is the checkpoint with the lowest val loss, in a run with
    validation.patience.
    """
    if direction is not None and kind == "full":
        raise click.UsageError("--direction is for hf and gguf; full has every direction.")
    convert(checkpoint, out, kind, dtype, max_shard_size, overwrite=overwrite, direction=direction)
    click.echo(f"wrote {out}")
    if kind != "gguf":
        from megaback.weights.model_folder import read_description

        made = read_description(out)
        show_next(use_commands(out, made.text_format.directions, on_examples=made.on_examples))


if __name__ == "__main__":
    main()
