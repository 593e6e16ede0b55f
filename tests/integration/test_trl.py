"""Fine-tuning by TRL and PEFT: what they learn from, and megaback with their models."""

import json
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from click.testing import CliRunner

import megaback
from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import sequential_batches
from data_pipeline.loading.rows import RowReader
from data_pipeline.shards.data_set import DataSet
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.jsonl import line_of
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec
from megaback.checkpoints.checkpoint import config_of, read_meta
from megaback.cli import main as megaback_command
from megaback.model.gpt import ReverseGPT
from megaback.training.validation import to_device
from megaback.weights.init_from import open_base
from megaback.weights.model_folder import load_model_folder, read_description
from tests.helpers.bpe import qwen_content
from tests.helpers.exports import write_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.server import load_models, serving
from tests.helpers.stored import read_weights
from tools.backtranslation.example_selection import Choice
from tools.backtranslation.row_forms import Form
from tools.convert import convert

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
CONTEXT_TOKENS = 64
STEPS = 8
IGNORED = -100


@pytest.fixture(scope="module", autouse=True)
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` with a temporary cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    codec: Callable[..., TextCodec],
    english_documents: list[str],
) -> Path:
    """An export, and rows of examples, one of which is longer than the context."""
    folder = tmp_path_factory.mktemp("trl")
    write_checkpoint(folder / "run", codec(), context_tokens=CONTEXT_TOKENS)
    convert(folder / "run", folder / "hf", "hf", "float32")
    sentences = [text.partition(".")[0] for text in english_documents[:24]]
    rows = [
        {
            "instruction": f" What came last in {i}?",
            "input": sentence.split()[-1],
            "output": sentence,
        }
        for i, sentence in enumerate(sentences)
    ]
    rows[3] |= {"input": "", "output": "<|im_end|> is text, and so is <|endoftext|>\n"}
    rows.append({"instruction": "Repeat.", "input": "", "output": "garden wall " * 60})
    (folder / "rows.jsonl").write_bytes(b"".join(map(line_of, rows)))
    texts = [{"text": text} for text in english_documents[:24]]
    (folder / "texts.jsonl").write_bytes(b"".join(map(line_of, texts)))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path, codec: Callable[..., TextCodec]) -> Path:
    """The rows by `megaback instruct build`."""
    settings = BuildSettings(
        sources=(WeightedSource(str(folder / "rows.jsonl")),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0,
        frame_tokens=1024,
        examples=ExampleColumns(),
        row_tokens=CONTEXT_TOKENS,
    )
    build_shards(settings, codec(), folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Any:
    """The trainer of `examples/trl_sft.py`, after its steps; all rows are in each."""
    train = runpy.run_path(str(ROOT / "examples/trl_sft.py"))["train"]
    paths = (str(folder / name) for name in ("hf", "rows.jsonl", "sft"))
    return train(*paths, steps=STEPS, batch_rows=24, rate=1e-2)


def test_rows_of_ids_for_other_trainers_are_those_of_the_tokenizer(
    folder: Path, tokenizer: Any
) -> None:
    """As `examples/tokenized_rows.py` writes them."""
    from datasets import load_from_disk

    write = runpy.run_path(str(ROOT / "examples/tokenized_rows.py"))["write"]
    write(*(str(folder / name) for name in ("hf", "rows.jsonl", "ids")))
    rows = load_from_disk(str(folder / "ids"))["train"]
    given = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert rows.to_list() == [
        dict(tokenizer.example(row["instruction"], row["output"], row["input"]))
        for row in given[:-1]  # the last one is longer than the context
    ]

    write(*(str(folder / name) for name in ("hf", "texts.jsonl", "text-ids")))
    for row in load_from_disk(str(folder / "text-ids"))["train"]:
        assert row["input_ids"] == row["labels"]
        assert row["input_ids"][-1] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def lora(folder: Path) -> Path:
    """The folder that `examples/peft_lora.py` writes."""
    train = runpy.run_path(str(ROOT / "examples/peft_lora.py"))["train"]
    paths = (str(folder / name) for name in ("hf", "texts.jsonl", "lora"))
    train(*paths, steps=2, batch_rows=4, rate=1e-2, rank=4)
    return folder / "lora"


@pytest.fixture(scope="module", params=["sft", "lora/merged"])
def trained(request: pytest.FixtureRequest, folder: Path, trainer: Any, lora: Path) -> Path:
    return folder / str(request.param)


def test_the_ids_and_labels_in_trls_batches_are_those_of_instruct_build(
    trainer: Any, shards: Path
) -> None:
    (batch,) = trainer.get_train_dataloader()
    theirs = {
        (tuple(ids[mask == 1].tolist()), tuple(labels[mask == 1].tolist()))
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        )
    }

    ours = set()
    rows = megaback.open_dataset(
        shards, context_tokens=CONTEXT_TOKENS, global_batch_rows=1, position_ids=True
    )
    for row in rows:
        starts = [*(row["position_ids"] == 0).nonzero().flatten().tolist(), CONTEXT_TOKENS]
        for first, end in pairwise(starts):
            targets = row["shift_labels"][first:end].tolist()
            if set(targets) != {IGNORED}:  # else padding
                ids = row["input_ids"][first:end].tolist()
                while targets[-1] == IGNORED:
                    targets.pop()
                ids = [*ids[: len(targets)], targets[-1]]
                ours.add((tuple(ids), (IGNORED, *targets)))
    assert len(ours) == 24
    assert theirs == ours


def test_the_first_loss_of_trl_is_that_of_megaback_and_it_falls(
    trainer: Any, folder: Path, shards: Path
) -> None:
    model, _, _ = load_model_folder(folder / "hf", CPU)
    rows = RowReader(FrameStore(DataSet.open(shards), "train"), CONTEXT_TOKENS, Direction.BACKWARD)
    batches = list(sequential_batches(rows, 0, 1, 1))
    with torch.inference_mode():
        nats = sum(float(model(*to_device(batch, CPU)).sum()) for batch in batches)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]

    assert losses[0] == pytest.approx(nats / sum(batch.num_targets for batch in batches), abs=1e-5)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)


def stock_model(vocab_size: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **layers))


def sft(out: Path, dataset: Any, tokenizer: Any, **options: Any) -> Any:
    """A trainer of TRL with its defaults, but `options`."""
    from trl import SFTConfig, SFTTrainer

    trainer_options = {key: options.pop(key) for key in ("formatting_func",) if key in options}
    return SFTTrainer(
        stock_model(len(tokenizer)),
        SFTConfig(str(out), use_cpu=True, bf16=False, max_steps=1, report_to="none", **options),
        train_dataset=dataset,
        processing_class=tokenizer,
        **trainer_options,
    )


QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
REFUSED = {
    "text": {"text": "the end"},
    "prompt-completion": {"prompt": "Why?", "completion": "So."},
    "messages": {"messages": [QUESTION, ANSWER]},
    "conversational prompt-completion": {"prompt": [QUESTION], "completion": [ANSWER]},
}


@pytest.mark.parametrize("columns", REFUSED)
def test_trl_cannot_encode_texts_with_the_tokenizer_of_an_export(
    columns: str, tokenizer: Any, tmp_path: Path
) -> None:
    """It would learn a spelled end marker, and an end from a beginning of the ids."""
    from datasets import Dataset

    with pytest.raises(NotImplementedError, match=r"TRL cannot encode texts and messages"):
        sft(tmp_path, Dataset.from_list([REFUSED[columns]] * 2), tokenizer)


def test_packing_by_bfd_keeps_the_loss_of_the_rows(trainer: Any, folder: Path) -> None:
    """No row is cut, and none attends to another."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    packed = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32),
        SFTConfig(
            str(folder / "packed"),
            packing=True,
            max_length=CONTEXT_TOKENS,
            per_device_train_batch_size=24,
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    packed.train()
    assert len(packed.train_dataset) < 24
    assert packed.state.log_history[0]["loss"] == pytest.approx(
        trainer.state.log_history[0]["loss"], abs=1e-5
    )


def test_the_end_of_a_document_is_a_target_of_the_stock_collator(tokenizer: Any) -> None:
    """Collators exclude the pad token from the loss."""
    from transformers import DataCollatorForLanguageModeling

    rows = [
        [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for text in ("the end", "an old man sat")
    ]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [{"input_ids": ids} for ids in rows]
    )
    for ids, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert [label for label in labels if label != IGNORED] == ids


def test_a_model_of_trl_or_peft_writes_and_is_served_by_megaback(trained: Path) -> None:
    options = ["--ending=the end.", "--max-new-tokens=4", "--temp=0"]
    written = CliRunner().invoke(megaback_command, ["sample", str(trained), *options])
    assert written.exit_code == 0, written.output
    text = written.stdout.rstrip("\n")
    assert text.endswith("the end.")

    with serving(load_models(trained, None, CPU, torch.float32, 2)) as running:
        body = {"prompt": "the end.", "max_tokens": 4, "temperature": 0}
        choice = running.post("/v1/completions", body).json()["choices"][0]
    assert f"{choice['text']}the end." == text


def test_a_run_starts_from_a_model_of_trl_or_peft(trained: Path, folder: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = next((folder / "run").rglob("step-*"))
    meta = read_meta(checkpoint)
    shape = config_of(checkpoint, meta).model
    model = ReverseGPT(shape, meta.vocab_size)
    base = open_base(trained, shape.resolved(), meta.vocab_size, meta.format, "the run")
    base.fill(model)

    theirs = load_file(trained / "model.safetensors")
    before = read_weights(folder / "hf")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, theirs[name])
    assert any(not torch.equal(weight, before[name]) for name, weight in theirs.items())


def test_a_model_of_trl_or_peft_is_exported_as_gguf(trained: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import load_file

    convert(trained, tmp_path / "gguf", "gguf", "float32")

    (file,) = (tmp_path / "gguf").glob("*.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    theirs = load_file(trained / "model.safetensors")
    assert tensors["output.weight"].tolist() == theirs["lm_head.weight"].tolist()


def test_an_adapter_of_peft_is_merged_with_its_base_as_by_peft(
    lora: Path, folder: Path, tmp_path: Path
) -> None:
    words = [str(lora / "adapter"), "--base", str(folder / "hf"), "--out", str(tmp_path / "merged")]
    result = CliRunner().invoke(megaback_command, ["convert", *words])
    assert result.exit_code == 0, result.output

    ours, theirs = read_weights(tmp_path / "merged"), read_weights(lora / "merged")
    assert ours.keys() == theirs.keys()
    assert all((weight - theirs[name]).abs().max() < 1e-6 for name, weight in ours.items())
    assert read_description(tmp_path / "merged").text_format.direction == Direction.BACKWARD


def test_an_adapter_without_its_base_is_refused_by_name(lora: Path) -> None:
    adapter = str(lora / "adapter")
    for words in (["sample", adapter], ["convert", adapter, "--to", "gguf", "--out", f"{lora}/x"]):
        result = CliRunner().invoke(megaback_command, words)
        assert result.exit_code == 40
        assert f"{adapter} is an adapter, not a model" in result.stderr
        assert f"megaback convert {adapter} --base BASE" in result.stderr


@pytest.fixture(scope="module")
def stock_tokenizer(english_documents: list[str]) -> Any:
    """A byte-level BPE of transformers, with a chat template of its own."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(english_documents, 500, special_tokens=["<eos>", "<pad>"])
    stock = PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    stock.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return stock


LEARNED = {
    "alpaca": "Say “no”.\nShe said no.\nTwice.<eos>",
    "messages": "user: Say “no”.<eos>assistant: She said no.\nTwice.<eos>",
    "messages, only the response": "She said no.\nTwice.<eos>",
    "prompt-completion": "She said no.\nTwice.<eos>",
}


@pytest.mark.parametrize("case", LEARNED)
def test_rows_of_backtranslate_are_loaded_by_datasets_and_learned_by_trl(
    case: str, stock_tokenizer: Any, tmp_path: Path
) -> None:
    from datasets import load_dataset

    proposals = [{"instruction": "Say “no”.", "score": -0.5, "log_probability": -4.0}]
    record = {"index": 0, "position": "a:1", "text": "She said no.\nTwice.", "proposals": proposals}
    form, _, only_response = case.partition(", ")
    (row,) = Choice(form=cast(Form, form)).examples(lambda: [record], Counter())
    (tmp_path / "rows.jsonl").write_bytes(line_of(row) * 2)
    rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train")
    assert rows[0] == row
    options: dict[str, Any] = {}
    if form == "alpaca":
        options["formatting_func"] = lambda row: f"{row['instruction']}\n{row['output']}"
    if only_response:
        rows = rows.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
            remove_columns="messages",
        )

    trainer = sft(tmp_path / "out", rows, stock_tokenizer, **options)
    (batch,) = trainer.get_train_dataloader()
    learned = stock_tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORED])

    assert learned == LEARNED[case]
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0


def test_grpo_learns_by_the_score_of_a_backward_model(
    folder: Path, stock_tokenizer: Any, tmp_path: Path
) -> None:
    script = runpy.run_path(str(ROOT / "examples/grpo_reward.py"))
    questions = ["Why?", "Who sold three horses?", "Name a planet."]
    answers = ["So.", "word " * CONTEXT_TOKENS, "Mars"]
    with megaback.load_scorer(folder / "hf") as scorer:
        rewards = script["reward_of"](scorer)(
            question=questions, completions=[[{"content": answer}] for answer in answers]
        )
        first, last = scorer.score(
            [megaback.Pair("Why?", "So."), megaback.Pair(questions[2], "Mars")]
        )
    assert rewards == [pytest.approx(first.log_ratio), None, pytest.approx(last.log_ratio)]

    stock_model(len(stock_tokenizer)).save_pretrained(tmp_path / "stock")
    stock_tokenizer.save_pretrained(tmp_path / "stock")
    (tmp_path / "rows.jsonl").write_bytes(b"".join(line_of({"question": q}) for q in questions))
    paths = (str(one) for one in (tmp_path / "stock", folder / "hf", tmp_path / "rows.jsonl"))
    trainer = script["train"](*paths, str(tmp_path / "out"), 1, samples=4, tokens=8, rate=1e-2)

    logged = trainer.state.log_history[0]
    assert logged["reward_std"] > 0
    assert logged["grad_norm"] > 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_trl_cannot_make_a_chat_template_for_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    """Neither one for training, nor that of another model."""
    import transformers
    from trl import chat_template_utils

    (tmp_path / "tokenizer.json").write_bytes(qwen_content())
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{tmp_path / 'tokenizer.json'}", chat_template="{{ messages }}"
    )
    other.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf", trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    with pytest.raises(NotImplementedError, match="tokenize=False is not supported"):
        chat_template_utils.get_training_chat_template(tokenizer)
    with pytest.raises(NotImplementedError, match="cannot take another chat template"):
        chat_template_utils.clone_chat_template(model, tokenizer, str(tmp_path))
