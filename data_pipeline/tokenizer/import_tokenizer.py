"""`megaback import tokenizer`: makes the tokenizer of another model usable, with our markers."""

from pathlib import Path

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.limits import MAX_TOKENIZER_BYTES
from data_pipeline.common.next_command import command, free_path, show_next
from data_pipeline.common.number_ranges import VOCABULARY
from data_pipeline.common.output_paths import overwrite_option, require_output, writing_output
from data_pipeline.common.regular_files import read_file
from data_pipeline.common.source_type import SOURCE
from data_pipeline.errors import TokenizerError
from data_pipeline.storage.hub_models import fetch_model, is_remote_model
from data_pipeline.text.tokenizer import TOKENIZER_JSON_NAME, TOKENIZER_NAMES, file_name_of
from data_pipeline.tokenizer.markers import MarkedTokenizer, with_markers


def _read(path: Path) -> bytes:
    """Content of a tokenizer's file, or of that in a folder. Raises TokenizerError."""
    in_folder = [path / name for name in reversed(TOKENIZER_NAMES) if (path / name).is_file()]
    found = in_folder[0] if in_folder else path
    try:
        return read_file(found, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer {found}: {error.strerror}; give a {TOKENIZER_JSON_NAME}, "
            "or a folder with one"
        ) from None


def import_tokenizer(
    path: Path, out: Path, num_rows: int | None = None, *, overwrite: bool = False
) -> MarkedTokenizer:
    """Write a tokenizer with the markers that it lacks; see `with_markers` for `num_rows`.

    Raises OutputExistsError, and TokenizerError for a tokenizer that is not supported.
    """
    content = _read(path)
    try:
        marked = with_markers(content, num_rows)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from None
    name = file_name_of(marked.content)
    if out.name != name:
        raise TokenizerError(
            f"`out` is {out}, but files of this kind of tokenizer are named {name}; end it in that"
        )
    require_output(out, [path], is_ours=_is_importable, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing_output(out, overwrite=overwrite) as file:
        file.write(marked.content)
    return marked


def _is_importable(path: Path) -> bool:
    """Whether a file is a tokenizer that has all markers already, as this command writes."""
    try:
        content = read_file(path, MAX_TOKENIZER_BYTES)
        return with_markers(content).content == content
    except (OSError, TokenizerError):
        return False


@click.command(
    cls=Command,
    name="tokenizer",
    epilog=examples(
        "megaback import tokenizer hf://Qwen/Qwen3-0.6B --out data/qwen3/tokenizer.json "
        "--vocab-size 151936",
        "megaback import tokenizer gpt2/tokenizer.json --out data/gpt2/tokenizer.json",
    ),
    help="Add our markers to the byte-level BPE tokenizer of another model. TOKENIZER is its "
    "tokenizer.json, a folder with one, or hf://OWNER/NAME of the Hugging Face hub. Text keeps the "
    "ids that it has there.",
)
@click.argument("tokenizer", type=SOURCE)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Path of the new tokenizer.json.",
)
@click.option(
    "--vocab-size",
    type=VOCABULARY.option,
    help="Rows of the model's embedding (vocab_size in its config.json), if they are more than the "
    "tokenizer's ids: the markers take the first free rows, and unused ids the others.",
)
@overwrite_option
def main(tokenizer: str, out: Path, vocab_size: int | None, overwrite: bool) -> None:
    """The command `megaback import tokenizer`."""
    is_remote = is_remote_model(tokenizer)
    path = fetch_model(tokenizer, TOKENIZER_NAMES).folder if is_remote else Path(tokenizer)
    marked = import_tokenizer(path, out, vocab_size, overwrite=overwrite)
    for piece, piece_id in marked.marker_ids.items():
        previous = marked.renamed.get(piece)
        origin = "" if previous is None else f"  was {previous}"
        click.echo(f"{piece:<18}{piece_id:>8,}{origin}")
    for what in marked.removed:
        click.echo(f"removed     {what}")
    click.echo(
        f"ids         {marked.vocab_size:,}, of which {marked.num_added:,} are new\n"
        f"written to  {out}"
    )
    if vocab_size is not None and marked.vocab_size > vocab_size:
        new = marked.vocab_size - vocab_size
        click.echo(f"note        the embedding needs {new:,} new rows for the last ids")
    shards = free_path(out.parent.parent / "shards")
    build = ("shards", "build", "--source", "novels", "--tokenizer", out, "--out", shards)
    show_next({command(*build): "encodes a source with it"})


if __name__ == "__main__":
    main()
