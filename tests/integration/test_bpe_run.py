"""A run with a tokenizer of byte-level BPE: shards, two ranks, a run from it, and exports."""

from collections.abc import Callable
from pathlib import Path

import megaback
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.markers import with_markers
from megaback.inference.sampling import SamplingOptions
from megaback.weights.model_folder import tokenizer_of
from tests.helpers.bpe import NUM_IDS, qwen_content
from tests.helpers.builds import build_here, documents_of, make_settings
from tools.convert import convert

ENDING = "the harbour."


def test_a_run_is_trained_continued_and_exported_with_a_tokenizer_json(
    run_of: Callable[..., Path],
    lonely_run_of: Callable[..., Path],
    tiny_text_folder: Path,
    tmp_path: Path,
) -> None:
    content = with_markers(qwen_content(), NUM_IDS + 40).content
    codec = TextCodec(content, Direction.BACKWARD, Unit.TOKEN)
    shards = tmp_path / "shards"
    build_here(make_settings(tiny_text_folder, codec), codec, shards)
    assert (shards / "tokenizer.json").read_bytes() == content
    assert DataSet.open(shards).codec().format == codec.format
    assert all(text.isascii() for text in documents_of(shards)["train"])

    short = (f"data.shards={shards}", "training.steps=4", "checkpoint.every_steps=2")
    run = run_of(*short, "validation.every_steps=4")
    base = lonely_run_of(*short, f"init_from={run}", "validation.every_steps=4")
    for trained in (run, base):
        (newest, *_) = sorted(trained.glob("checkpoints/step-*"), reverse=True)
        assert (newest / "tokenizer.json").read_bytes() == content

    texts = set()
    for kind in ("full", "hf"):
        convert(run, tmp_path / kind, kind, "float32")
        assert tokenizer_of(tmp_path / kind).read_bytes() == content
        writer = megaback.load(tmp_path / kind, device="cpu")
        options = SamplingOptions(temperature=0.0, max_new_tokens=8)
        texts.update(writer.complete_many([ENDING], options))
    (text,) = texts
    assert text.endswith(ENDING)
    assert len(text) > len(ENDING)
