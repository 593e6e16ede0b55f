"""Cost of building relative to bare tokenization: text in memory to a shard on disk, one core.

    python benchmarks/build_shards.py TOKENIZER SOURCE

CPU time on the same documents, contenders in turns within one run. Ours includes loading and
checking the encoder, the hash that decides the split, reversal, markers, compression, checksums
and writing. If datatrove is installed, its tokenization step with the same pieces is included; it
writes uncompressed ids.
"""

import hashlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import click
import sentencepiece
from smoke import Benchmark, is_installed

from data_pipeline.build.task_input import belongs_to_val
from data_pipeline.common.atomic import replacing
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources.registry import list_slices, read_slice
from data_pipeline.text.codec import END_PIECE, Direction, TextCodec, Unit
from data_pipeline.text.encoder import in_batches


def bare_sentencepiece(model_bytes: bytes, texts: Sequence[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    for text in texts:
        processor.encode(text)


def bare_kitoken(model_bytes: bytes, texts: Sequence[str]) -> None:
    from kitoken import Kitoken

    encoder = Kitoken.from_sentencepiece(model_bytes)
    for text in texts:
        encoder.encode(text)


def encode_documents(model_bytes: bytes, texts: Sequence[str]) -> None:
    codec = TextCodec(model_bytes, Direction.BACKWARD, Unit.TOKEN)
    for batch in in_batches(texts):
        codec.encode_documents(batch)


def text_to_shard(model_bytes: bytes, texts: Sequence[str]) -> None:
    codec = TextCodec(model_bytes, Direction.BACKWARD, Unit.TOKEN)
    with tempfile.TemporaryDirectory() as folder, replacing(Path(folder) / "shard.zst") as file:
        writer = ShardWriter(file, codec.format.to_dict(), codec.id_dtype)
        for batch in in_batches(texts):
            for text, ids in zip(batch, codec.encode_documents(batch), strict=True):
                text_utf8 = text.encode("utf-8", "surrogatepass")
                belongs_to_val(hashlib.sha256(text_utf8).digest(), 0.01)
                writer.add(ids, len(text_utf8))
        writer.finish()


@cache
def tokenizers_json(model_bytes: bytes) -> str:
    """The same pieces and merges for Hugging Face's tokenizers; runs of spaces may differ."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    ids = {processor.id_to_piece(index): index for index in range(processor.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, index in sorted(ids.items(), key=lambda item: -processor.get_score(item[1]))
        if not (processor.is_control(index) or processor.is_byte(index))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    json: str = tokenizer.to_str()
    return json


def datatrove_tokens(model_bytes: bytes, texts: Sequence[str]) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(tokenizers_json(model_bytes), encoding="utf-8")
        step = DocumentTokenizer(
            folder, str(path), save_filename="ids", eos_token=END_PIECE, shuffle_documents=False
        )
        step.run(Document(text=text, id=str(index)) for index, text in enumerate(texts))


CONTENDERS: dict[str, Callable[[bytes, Sequence[str]], None]] = {
    "bare SentencePiece": bare_sentencepiece,
    "bare kitoken": bare_kitoken,
    "ours, ids only": encode_documents,
    "ours, text to shard": text_to_shard,
}


def read_texts(source: str, megabytes: int) -> list[str]:
    """The first documents of a source, up to a size in UTF-8 bytes."""
    texts: list[str] = []
    remaining_bytes = megabytes * 1_000_000
    for piece in list_slices(source):
        for document in read_slice(piece):
            if remaining_bytes <= 0:
                return texts
            texts.append(document.text)
            remaining_bytes -= len(document.text.encode("utf-8", "surrogatepass"))
    return texts


def measure(model_bytes: bytes, texts: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each contender, in turns, so that load on the machine affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name, run in CONTENDERS.items():
            started = time.process_time()
            run(model_bytes, texts)
            seconds[name].append(time.process_time() - started)
    return seconds


def peak_bytes() -> int:
    """Peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@click.command(cls=Benchmark, smoke="{tokenizer} {text} --megabytes 1 --repeats 1")
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--megabytes", default=32, show_default=True, help="Text to encode.")
@click.option(
    "--repeats", default=5, show_default=True, help="Runs per contender; medians are printed."
)
def main(tokenizer: Path, source: str, megabytes: int, repeats: int) -> None:
    """Print the median MB of text per CPU second of each, and the ratios."""
    if is_installed("datatrove", "datatrove"):
        CONTENDERS["datatrove"] = datatrove_tokens
    texts = read_texts(source, megabytes)
    text_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    codec = TextCodec.load(tokenizer, Direction.BACKWARD, Unit.TOKEN)
    started = time.process_time()
    encoder_name = codec.encoder_name
    check_s = time.process_time() - started
    before_bytes = peak_bytes()
    text_to_shard(codec.model_bytes, texts)
    after_bytes = peak_bytes()
    if "datatrove" in CONTENDERS:
        tokenizers_json(codec.model_bytes)  # not counted
    seconds = measure(codec.model_bytes, texts, repeats)
    base_s = statistics.median(seconds["bare SentencePiece"])

    click.echo(
        f"{len(texts):,} documents, {text_bytes / 1e6:.1f} MB; sentencepiece "
        f"{sentencepiece.__version__}; encoder: {encoder_name}, loaded and checked in "
        f"{1e3 * check_s:.0f} ms"
    )
    for name, each_s in seconds.items():
        median_s = statistics.median(each_s)
        click.echo(
            f"{name:20} {text_bytes / median_s / 1e6:6.2f} MB per CPU-second "
            f"({text_bytes / max(each_s) / 1e6:.2f} to {text_bytes / min(each_s) / 1e6:.2f})  "
            f"ratio {base_s / median_s:5.2f}"
        )
    click.echo(
        f"peak memory of ours  {after_bytes / 1e6:6.0f} MB, "
        f"{before_bytes / 1e6:.0f} MB of it with the text alone"
    )


if __name__ == "__main__":
    main()
