"""An untrusted Hugging Face model scores as in transformers, or is refused."""

import json
import os
import resource
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointCorruptError, PromptError
from megaback.scoring.hf_scorer import HfScorer, _require_all_read
from megaback.scoring.pairs import Pair
from tests.helpers.hostile_files import bounded

CPU = torch.device("cpu")


def test_a_score_is_the_sum_of_the_models_log_probabilities(foreign: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = [
        Pair("Who sold the map?", "My younger sister."),
        Pair("Who?", "The old captain sold it for nine shillings."),
    ]
    found = HfScorer(foreign, CPU).score(pairs)

    tokenizer = AutoTokenizer.from_pretrained(foreign)
    model = AutoModelForCausalLM.from_pretrained(foreign).eval()
    for pair, score in zip(pairs, found, strict=True):
        given = tokenizer(f"<s><user>{pair.question}<answer>", add_special_tokens=False).input_ids
        written = [*tokenizer(pair.answer, add_special_tokens=False).input_ids, 1]
        with torch.inference_mode():
            logits_TV = model(torch.tensor([[*given, *written]])).logits[0]
        log_TV = logits_TV.double().log_softmax(-1)
        alone = sum(float(log_TV[len(given) - 1 + at, token]) for at, token in enumerate(written))
        assert score.log_probability == pytest.approx(alone, abs=1e-4)
        assert score.tokens == len(written)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("model.layers.0.self_attn.q_proj.bias", torch.zeros(16), "bias is not in the model"),
        ("model.norm.weight", torch.ones(15), "cannot be read"),
    ],
    ids=["missing", "unread", "shape"],
)
def test_a_model_that_differs_from_its_files_is_refused(
    name: str, change: torch.Tensor | None, said: str, foreign: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    if change is not None:
        weights[name] = change
    else:
        weights.pop(name, None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointCorruptError, match=said):
        HfScorer(folder, CPU)


def test_a_head_that_the_library_replaces_by_the_embeddings_is_refused(foreign: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(foreign, dtype=torch.float32)
    whole = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
    _require_all_read(foreign, model, whole)
    model.lm_head.weight = model.model.embed_tokens.weight  # as some versions do

    with pytest.raises(
        CheckpointCorruptError, match=r"lm_head.weight contradicts tie_word_embeddings"
    ):
        _require_all_read(foreign, model, whole)


def test_special_tokens_that_a_text_spells_are_encoded_as_text(foreign: Path) -> None:
    encoded = HfScorer(foreign, CPU).encode(Pair("<user> or <answer>?", "</s><s>"))
    assert [token for token in encoded.given if token < 4] == [0, 2, 3]
    assert [token for token in encoded.written if token < 4] == [1]


def test_without_a_template_the_question_precedes_a_newline(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "plain"))
    (folder / "chat_template.jinja").unlink()
    scorer = HfScorer(folder, CPU)
    encoded = scorer.encode(Pair("Who?", "me"))
    assert scorer._tokenizer.decode(encoded.given) == "<s>Who?\n"
    with pytest.raises(PromptError, match="forward model's context of 64"):
        scorer.encode(Pair("Who? " * 60, "me"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointCorruptError, match="save_pretrained"):
        HfScorer(tmp_path, CPU)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_foreign_folder_is_run(file: str, foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    fields = json.loads((folder / file).read_text())
    theirs = {"AutoConfig": "theirs.C", "AutoTokenizer": ["theirs.T", None]}
    fields |= {"auto_map": theirs | {"AutoModelForCausalLM": "theirs.M"}, "model_type": "theirs"}
    fields |= {"tokenizer_class": "TheirTokenizer"}
    (folder / file).write_text(json.dumps(fields))
    with suppress(CheckpointCorruptError):  # or the library's own class is used
        HfScorer(folder, CPU)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ ().__class__.mro() }}", "{% if"]
)
def test_a_template_that_cannot_be_rendered_is_refused(
    template: str, foreign: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointCorruptError, match="chat template"):
        HfScorer(folder, CPU)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 20000000000 }}",
        "{% set x = namespace(a='a' * 9) %}{% for i in range(28) %}{% set x.a = x.a ~ x.a %}"
        "{% endfor %}{{ x.a }}",
    ],
)
def test_an_endless_template_is_stopped(template: str, foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(CheckpointCorruptError, match=r"chat template.*(TimeoutError|MemoryError)"):
        HfScorer(folder, CPU)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_hidden_layers", 30_000, "30000 layers: there are 21 tensors"),
        ("num_hidden_layers", 1 << 70, "layers: there are 21 tensors"),
        ("max_position_embeddings", "x", "cannot be read as a causal model"),
        ("num_hidden_layers", 21, "its files have"),
        ("num_key_value_heads", 1 << 20, "its files have"),
        ("vocab_size", 1 << 40, "its files have"),
        ("hidden_size", 1 << 30, "its files have"),
        ("intermediate_size", 1 << 62, "cannot be read"),
        ("num_attention_heads", [2], "cannot be read"),
        ("dtype", [[]], "cannot be read"),
    ],
)
def test_a_config_that_is_larger_than_its_files_is_refused(
    name: str, value: object, said: str, foreign: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "model"))
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, name: value}))
    with bounded(), pytest.raises(CheckpointCorruptError, match=said):
        HfScorer(folder, CPU)


def test_pipes_and_huge_files_are_refused(foreign: Path, tmp_path: Path) -> None:
    def broken(number: int, name: str) -> Path:
        folder = Path(shutil.copytree(foreign, tmp_path / str(number)))
        (folder / name).unlink(missing_ok=True)
        return folder

    pipe, device, sparse, garbage, adapter = (
        broken(number, name)
        for number, name in enumerate((*("tokenizer.json",) * 4, "adapter_config.json"))
    )
    os.mkfifo(pipe / "tokenizer.json")
    (device / "tokenizer.json").symlink_to("/dev/zero")
    with (sparse / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    (garbage / "tokenizer.json").write_text('{"version": 7, "model": []}')
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/"}')
    for folder in (pipe, device, sparse, garbage, adapter):
        with bounded(), pytest.raises(CheckpointCorruptError, match="cannot be read"):
            HfScorer(folder, CPU)
