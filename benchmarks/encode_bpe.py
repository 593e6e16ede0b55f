"""Encoding with byte-level BPE relative to `tokenizers`, whose ids are the same, on one core.

    python benchmarks/encode_bpe.py TOKENIZER_JSON SOURCE

CPU time on the same documents, contenders in turns within one run. Ours does not include loading
and checking the encoder, whose time is printed by itself. `tokenizers` runs with one thread.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from build_shards import read_texts
from smoke import Benchmark

from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.encoder import in_batches
from data_pipeline.tokenizer.markers import with_markers


def contenders(content: bytes) -> dict[str, Callable[[Sequence[str]], None]]:
    """Functions that encode all texts, each loaded beforehand."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_buffer(content)
    codec = TextCodec(content, Direction.BACKWARD, Unit.TOKEN)
    started = time.process_time()
    name = codec.encoder_name
    click.echo(f"encoder: {name}, loaded and checked in {time.process_time() - started:.1f} s")
    codec.encode_all(["a " * 50 * codec.vocab_size])  # the faster encoder is for much text

    def ours(texts: Sequence[str]) -> None:
        for batch in in_batches(texts):
            codec.encode_documents(batch)

    def theirs(texts: Sequence[str]) -> None:
        for batch in in_batches(texts):
            library.encode_batch(batch, add_special_tokens=False)

    return {"tokenizers, encode_batch": theirs, "ours": ours}


@click.command(cls=Benchmark, smoke="{tokenizer_json} {text} --megabytes 1 --repeats 1")
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--megabytes", default=16, show_default=True, help="Text to encode.")
@click.option("--repeats", default=5, show_default=True, help="Runs per contender.")
def main(tokenizer: Path, source: str, megabytes: int, repeats: int) -> None:
    """Print the median MB of text per CPU second of each, and the ratios."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    functions = contenders(with_markers(tokenizer.read_bytes()).content)
    texts = read_texts(source, megabytes)
    text_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, encode in functions.items():
            started = time.process_time()
            encode(texts)
            seconds[name].append(time.process_time() - started)
    base_s = statistics.median(seconds["tokenizers, encode_batch"])
    click.echo(f"{len(texts):,} documents, {text_bytes / 1e6:.1f} MB")
    for name, each_s in seconds.items():
        median_s = statistics.median(each_s)
        click.echo(
            f"{name:24} {text_bytes / median_s / 1e6:6.2f} MB per CPU-second "
            f"({text_bytes / max(each_s) / 1e6:.2f} to {text_bytes / min(each_s) / 1e6:.2f})  "
            f"ratio {base_s / median_s:5.2f}"
        )


if __name__ == "__main__":
    main()
