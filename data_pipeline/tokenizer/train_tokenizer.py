"""`megaback tokenizer train`: trains a SentencePiece model on a sample of the sources.

The sample depends on the sources and settings alone: the same ones give the same model, byte for
byte. Model and report are written together.
"""

import errno
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import click

from data_pipeline.build.options import html_option, sources_option, text_column_option
from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.interrupts import interruptible
from data_pipeline.common.limits import MAX_TOKENIZER_BYTES, MAX_VOCABULARY
from data_pipeline.common.next_command import command, free_path, show_next
from data_pipeline.common.number_ranges import COUNT, SOURCE_WEIGHT, VOCABULARY
from data_pipeline.common.output_paths import (
    overwrite_option,
    read_object,
    require_output,
    writing_output,
)
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import BadRecordError, SourceEmptyError, TokenizerError
from data_pipeline.sources.documents import Columns, stop_or_skip
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES, max_record_bytes_option
from data_pipeline.sources.registry import require_outside
from data_pipeline.sources.skipped import (
    RECORDS,
    Skipped,
    add_skipped,
    count_skipped,
    merged,
    skipped_lines,
    why_records_are_bad,
)
from data_pipeline.sources.weighted import WeightedSource, on_bad_record_option, weighted_sources
from data_pipeline.text.codec import BEGIN_PIECE, CHAT_PIECES, END_PIECE
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.text_sample import num_bytes, sample_texts

REPORT_NAME = "tokenizer_report.json"
DEFAULT_VOCAB_SIZE = 8888
DEFAULT_SAMPLE_BYTES = 200_000_000

_CHARACTER_COVERAGE = 0.9995
_NUM_THREADS = 4  # stored in the model, so it must not depend on the machine
_MAX_SENTENCE_BYTES = 1 << 30  # SentencePiece's limit: it drops longer sentences
_SENTENCE_CHARACTERS = 1 << 20
_MEASURED_BYTES = 4 << 20
_SHOWN_PIECES = 20

# SentencePiece writes a space as U+2581 and drops sentences with U+2585; lone surrogates are not
# UTF-8. Text is cut at these characters, which byte pieces encode.
_UNTRAINABLE = re.compile("[\u2581\u2585\ud800-\udfff]+")
_MIN_PIECES = 3
"""Above this, SentencePiece fails without a message with the possible number of pieces."""
_TOO_LARGE = re.compile(r"Vocabulary size too high .* value <= (\d+)")
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class TokenizerReport:
    """Training data and compression of a tokenizer."""

    source: str
    text_column: str
    vocab_size: int
    sample_bytes: int
    """Maximum size of the sample in bytes."""
    documents: int
    """Number of documents in the sample."""
    text_bytes: int
    """Number of UTF-8 bytes in the sample."""
    bytes_per_token: float
    """Measured, as is coverage, on about 4 MiB from all parts of the sample."""
    coverage: float
    """Fraction of the text's bytes that are not encoded by byte pieces."""
    longest_pieces: tuple[str, ...]
    model_sha256: str
    sentencepiece_version: str
    skipped: Skipped
    """Skipped records by cause, in the part of the sources that was sampled."""


def train_tokenizer(
    source: str | Sequence[WeightedSource],
    out_dir: Path,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    max_bytes: int = DEFAULT_SAMPLE_BYTES,
    text_column: str = "text",
    on_bad_record: str = "stop",
    *,
    html: bool = False,
    overwrite: bool = False,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> TokenizerReport:
    """Write `tokenizer.model` and `tokenizer_report.json` into `out_dir`, and return the report.

    The sample is held in memory: up to `max_bytes` of UTF-8. Raises OutputExistsError,
    TokenizerError when the vocabulary does not fit the text, and the errors of the sources.
    """
    import sentencepiece

    model_path, report_path = out_dir / TOKENIZER_NAME, out_dir / REPORT_NAME
    for path in (model_path, report_path):
        require_output(path, is_ours=_is_trained_here, overwrite=overwrite)
    sources = (WeightedSource(source),) if isinstance(source, str) else source
    for part in sources:
        require_outside(part.source, out_dir)
    skipped: Skipped = {}

    def skip(error: BadRecordError) -> None:
        count_skipped(skipped, RECORDS, error.cause, error.place, error.number)

    on_bad = stop_or_skip if on_bad_record == "stop" else skip
    columns = Columns(text_column, html=html)
    count_files = partial(add_skipped, skipped)
    texts = list(sample_texts(sources, max_bytes, columns, on_bad, count_files, max_record_bytes))
    sentences = [sentence for text in texts for sentence in _sentences(text)]
    described = ", ".join(map(str, sources))
    if not sentences:
        reasons = why_records_are_bad(skipped)
        raise SourceEmptyError(
            f"{described}: it holds no text to train on"
            f"{reasons and f'; why records are bad: {reasons}'}; "
            f"{'fix the records' if reasons else 'name another source'}"
        )
    model = _train(sentences, vocab_size)
    report = TokenizerReport(
        source=described,
        text_column=text_column,
        vocab_size=vocab_size,
        sample_bytes=max_bytes,
        documents=len(texts),
        text_bytes=sum(map(num_bytes, texts)),
        **asdict(_measure(model, sentences)),
        model_sha256=hashlib.sha256(model).hexdigest(),
        sentencepiece_version=sentencepiece.__version__,
        skipped=merged([skipped]),
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    with (
        writing_output(report_path, overwrite=overwrite) as report_file,
        writing_output(model_path, overwrite=overwrite) as model_file,
    ):
        report_file.write((json.dumps(asdict(report), indent=2) + "\n").encode())
        model_file.write(model)
    return report


def _is_trained_here(path: Path) -> bool:
    """Whether a tokenizer, or its report, was written by `train_tokenizer`, and both match."""
    report = read_object(path.with_name(REPORT_NAME))
    try:
        model = read_file(path.with_name(TOKENIZER_NAME), MAX_TOKENIZER_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, *UNFIT):
            return False
        raise
    return report is not None and report.get("model_sha256") == hashlib.sha256(model).hexdigest()


def _sentences(text: str) -> Iterator[str]:
    """Pieces of a text for the trainer, without the characters that it cannot learn."""
    for part in _UNTRAINABLE.split(text):
        for start in range(0, len(part), _SENTENCE_CHARACTERS):
            yield part[start : start + _SENTENCE_CHARACTERS]


def _train(sentences: Sequence[str], vocab_size: int) -> bytes:
    """The serialized model. Raises TokenizerError."""
    import sentencepiece

    if vocab_size > MAX_VOCABULARY:
        raise TokenizerError(
            f"`vocab_size` is {vocab_size}, more than a tokenizer may have; use "
            f"{MAX_VOCABULARY} or less"
        )
    model = io.BytesIO()
    # A space needs a piece of its own: spelled in bytes, it would be decoded as U+2581.
    of_spaces = {} if any(" " in text for text in sentences) else {"required_chars": "\u2581"}
    try:
        interruptible(
            sentencepiece.SentencePieceTrainer.train,
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=max(vocab_size, _MIN_PIECES),
            character_coverage=_CHARACTER_COVERAGE,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            bos_piece=BEGIN_PIECE,
            eos_id=2,
            eos_piece=END_PIECE,
            pad_id=-1,
            control_symbols=list(CHAT_PIECES),
            max_sentence_length=_MAX_SENTENCE_BYTES,
            num_threads=_NUM_THREADS,
            minloglevel=2,
            **of_spaces,
        )
    except RuntimeError as error:
        raise _tokenizer_error(str(error), vocab_size) from None
    return model.getvalue()


def _tokenizer_error(reason: str, vocab_size: int) -> TokenizerError:
    if too_large := _TOO_LARGE.search(reason):
        return TokenizerError(
            f"`vocab_size` is {vocab_size}, but this text gives at most {too_large[1]} pieces; "
            f"use {too_large[1]} or less, or a source with more text"
        )
    if too_small := _TOO_SMALL.search(reason):
        return TokenizerError(
            f"`vocab_size` is {vocab_size}, too few for 256 bytes, the markers and the characters "
            f"of this text; use {too_small[1]} or more"
        )
    return TokenizerError(f"SentencePiece cannot train on this source: {reason.strip()}")


@dataclass(frozen=True)
class _Fit:
    """Measures of how well a model fits a text: see the fields of the report."""

    bytes_per_token: float
    coverage: float
    longest_pieces: tuple[str, ...]


def _measure(model: bytes, sentences: Sequence[str]) -> _Fit:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    spread_bytes = sum(map(num_bytes, sentences))
    stride = max(1, spread_bytes // _MEASURED_BYTES)
    text_bytes = num_tokens = num_byte_pieces = 0
    for sentence in sentences[::stride]:
        ids = processor.encode(sentence[:_MEASURED_BYTES])
        text_bytes += num_bytes(sentence[:_MEASURED_BYTES])
        num_tokens += len(ids)
        num_byte_pieces += sum(map(processor.is_byte, ids))
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    longest = sorted(
        (piece for index, piece in enumerate(pieces) if not processor.is_control(index)),
        key=lambda piece: (-len(piece), piece),
    )
    return _Fit(
        round(text_bytes / num_tokens, 4),
        round(1 - num_byte_pieces / text_bytes, 6),
        tuple(piece.replace("\u2581", " ") for piece in longest[:_SHOWN_PIECES]),
    )


@click.command(
    cls=WorkCommand,
    name="train",
    epilog=examples(
        "megaback tokenizer train --source pydocs --out data/tokenizer",
        "megaback tokenizer train --source hf:HuggingFaceFW/fineweb-edu:sample-10BT --out "
        "data/tokenizer --vocab-size 32000",
    ),
    help="Train a SentencePiece tokenizer on a sample from all parts of the sources.",
)
@sources_option(required=True)
@click.option(
    "--weight",
    "weights",
    type=SOURCE_WEIGHT.option,
    multiple=True,
    help="Weight of each --source in the sample, relative to its size; one per --source, in the "
    "same order. Default: 1.",
)
@click.option(
    "--out",
    "out_dir",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for tokenizer.model and tokenizer_report.json.",
)
@click.option(
    "--vocab-size",
    default=DEFAULT_VOCAB_SIZE,
    show_default=True,
    type=VOCABULARY.option,
    help="Number of pieces, including bytes and markers.",
)
@click.option(
    "--sample-bytes",
    default=DEFAULT_SAMPLE_BYTES,
    show_default=True,
    type=COUNT.option,
    help="Maximum bytes of text to train on, from all parts of the sources; held in memory.",
)
@text_column_option
@on_bad_record_option("stop")
@max_record_bytes_option
@html_option
@overwrite_option
def main(
    sources: tuple[str, ...],
    weights: tuple[float, ...],
    out_dir: Path,
    vocab_size: int,
    sample_bytes: int,
    text_column: str,
    on_bad_record: str,
    max_record_bytes: int,
    html: bool,
    overwrite: bool,
) -> None:
    """The command `megaback tokenizer train`."""
    weighted = weighted_sources(sources, weights)
    report = train_tokenizer(
        weighted,
        out_dir,
        vocab_size,
        sample_bytes,
        text_column,
        on_bad_record,
        html=html,
        overwrite=overwrite,
        max_record_bytes=max_record_bytes,
    )
    model_path = out_dir / TOKENIZER_NAME
    words = [word for part in weighted for word in ("--source", part.source)]
    words += [word for weight in weights for word in ("--weight", f"{weight:g}")]
    words += [] if text_column == "text" else ["--text-column", text_column]
    words += ["--html"] if html else []
    if max_record_bytes != DEFAULT_MAX_RECORD_BYTES:
        words += ["--max-record-bytes", str(max_record_bytes)]
    shards = free_path(out_dir.parent / "shards")
    click.echo(
        f"pieces       {report.vocab_size:,}\n"
        f"trained on   {report.documents:,} documents, {report.text_bytes:,} bytes\n"
        f"bytes/token  {report.bytes_per_token:.2f}\n"
        f"coverage     {report.coverage:.4%} of the text's bytes without byte pieces\n"
        f"longest      {', '.join(map(repr, report.longest_pieces[:5]))}\n"
        + "".join(f"{line}\n" for line in skipped_lines(report.skipped))
        + f"written to   {model_path}"
    )
    show_next({command("shards", "build", *words, "--tokenizer", model_path, "--out", shards): ""})


if __name__ == "__main__":
    main()
