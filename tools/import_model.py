"""`megaback import model`: checkpoints of transformers and DeepSpeed become model folders.

Weights are read and written one tensor at a time, and the folder is renamed to its final name once
it is complete.
"""

from pathlib import Path

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.next_command import command, free_path, show_next
from data_pipeline.common.number_ranges import CONTEXT
from data_pipeline.common.output_folder import require_output_folder, whole_folder
from data_pipeline.common.output_paths import overwrite_option
from data_pipeline.common.shared_options import out_folder_option
from data_pipeline.common.source_type import SOURCE
from data_pipeline.common.terminal import echo
from data_pipeline.storage.hub_models import fetch_model, is_remote_model
from data_pipeline.text.codec import Directions
from data_pipeline.text.tokenizer import file_name_of
from tools.convert import max_shard_size_option


@click.command(
    cls=WorkCommand,
    name="import model",
    epilog=examples(
        "megaback import model hf://Qwen/Qwen3-0.6B --direction backward --context-tokens 1024 "
        "--out models/qwen3-backward",
        "megaback import model runs/theirs/global_step1000 --config models/Qwen3-0.6B "
        "--tokenizer data/tokenizer/tokenizer.model --direction forward --out models/theirs",
    ),
)
@click.argument("path", type=SOURCE)
@out_folder_option
@overwrite_option
@click.option(
    "--direction",
    type=click.Choice([direction.value for direction in Directions]),
    required=True,
    help="Direction in which the model is used or trained further. The weights stay as they are: "
    "those of a forward model are a starting point for a backward one.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="config.json of transformers, or its folder. Default: the one beside the weights.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="File of the tokenizer, or its folder. Default: the one beside the weights.",
)
@click.option(
    "--context-tokens",
    type=CONTEXT.option,
    help="Context of the model, in tokens. Default: the config's max_position_embeddings.",
)
@max_shard_size_option
def main(
    path: str,
    out: Path,
    overwrite: bool,
    direction: str,
    config: Path | None,
    tokenizer: Path | None,
    context_tokens: int | None,
    max_shard_size: int,
) -> None:
    """Import PATH: a folder of save_pretrained (Llama or Qwen3), or a checkpoint of DeepSpeed.

    DeepSpeed's checkpoints are folders such as global_step1000, of ZeRO stages 0 to 3 or universal.
    hf://OWNER/NAME, or hf://OWNER/NAME@REVISION, is a model of the Hugging Face hub, whose files
    are kept in the hub's own cache.
    """
    require_output_folder(out, [path], overwrite=overwrite)
    from megaback.weights.imported import DESCRIPTION_FILES, open_import
    from megaback.weights.model_folder import write_model_folder

    hub = fetch_model(path, DESCRIPTION_FILES) if is_remote_model(path) else None
    model = open_import(
        Path(path) if hub is None else hub.folder,
        Directions(direction),
        config=config,
        tokenizer=tokenizer,
        context_tokens=context_tokens,
        hub=hub,
    )
    source, shape = model.source, model.source.description.shape
    imported = source.description.imported
    assert imported is not None
    kind = "Qwen3" if shape.qk_norm else "Llama"
    echo(
        f"model  {imported.shown}: {kind} with {shape.num_layers} layers, width {shape.width}, "
        f"{shape.num_heads} heads of {shape.head_size}, vocabulary "
        f"{source.description.vocab_size:,}, context {source.description.context_tokens:,}"
    )
    marked = model.marked
    for piece, piece_id in marked.marker_ids.items():
        origin = f"  was {marked.renamed[piece]}" if piece in marked.renamed else ""
        echo(f"marker {piece:<18}{piece_id:>8,}{origin}")
    for what in marked.removed:
        echo(f"removed from the tokenizer: {what}")
    if imported.added_rows:
        echo(
            f"added  {imported.added_rows:,} rows for markers, each the mean of the other rows "
            "of embeddings and lm_head"
        )
    with whole_folder(out, overwrite=overwrite) as folder:
        write_model_folder(
            folder, source.description, model.specs, source.read, source.tokenizer, max_shard_size
        )
    click.echo(f"wrote {out}")
    tokenizer_path = out / file_name_of(source.tokenizer)
    shards = free_path(Path("data") / out.name)
    build = ("shards", "build", "--source", "novels", "--tokenizer", tokenizer_path)
    show_next(
        {
            command("inspect", out): "the model, and where its weights come from",
            command(*build, "--out", shards): "data to train it on",
        }
    )


if __name__ == "__main__":
    main()
