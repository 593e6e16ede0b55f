"""Exports that other programs trained, merged or cast are reported as changed, not damaged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    MegabackError,
    RunMismatchError,
    TokenizerError,
)
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.checkpoint import read_meta
from megaback.config import Config
from megaback.model.gpt import ReverseGPT
from megaback.weights.init_from import open_base
from megaback.weights.model_folder import load_model_folder, open_weights, read_description
from tests.helpers.exports import write_checkpoint
from tests.helpers.stored import read_weights
from tools.convert import convert
from tools.inspect_path import main as inspect_command
from tools.sample import main as sample_command

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
Codecs = Callable[..., TextCodec]

_OTHERS = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
)
hf, out = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(hf, trust_remote_code=True)
texts = ["the old captain sold three white horses.", "his uncle forgot the garden wall."] * 4
rows = [{"input_ids": [*tokenizer(text).input_ids, tokenizer.eos_token_id]} for text in texts]

model = AutoModelForCausalLM.from_pretrained(hf)
arguments = TrainingArguments(
    output_dir=out / "trainer", max_steps=2, per_device_train_batch_size=4, learning_rate=0.01,
    report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(
    model, arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer
)
trainer.train()
trainer.save_model(out / "trained")

model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(hf),
    LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
)
model.save_pretrained(out / "adapter")
model.merge_and_unload().save_pretrained(out / "merged", max_shard_size="30KB")
tokenizer.save_pretrained(out / "merged")

model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float16)
model.save_pretrained(out / "cast")
tokenizer.save_pretrained(out / "cast")
model.save_pretrained(out / "no-tokenizer")

model = AutoModelForCausalLM.from_pretrained(hf)
model.model.norm.weight.data.add_(1)
model.save_pretrained(out / "in-place")
"""
KINDS = ["trained", "merged", "cast", "in-place"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Path:
    folder = tmp_path_factory.mktemp("changed") / "run"
    write_checkpoint(folder, codec(), qk_norm=True, tie_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def others(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with models that transformers and peft derive from an export, and the export `hf`."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    out = tmp_path_factory.mktemp("others")
    convert(run, out / "hf", "hf", "float32")
    convert(run, out / "in-place", "hf", "float32", max_file_bytes=30_000)
    (out / "others.py").write_text(_OTHERS)
    result = subprocess.run(
        [sys.executable, "-P", out / "others.py", out / "hf", out],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return out


def called(command: object, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: weight for file in files for name, weight in file.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_saved_by_another_program_is_read_and_reported_as_changed(
    kind: str, others: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = others / kind
    model, description, _ = load_model_folder(folder, CPU)

    theirs = stored(folder)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, theirs[name].float())
    assert description.text_format == read_description(others / "hf").text_format
    (note,) = caplog.messages
    assert str(folder) in note
    assert "was changed since megaback wrote it" in note
    assert str(open_weights(folder, read_description(folder)).changed[0]) in note

    looked = called(inspect_command, folder, "--verify")
    assert looked.exit_code == 0, looked.output
    assert "by another program" in looked.output
    assert "val_loss" not in looked.output
    written = called(sample_command, folder, "--ending=the end.", "--max-new-tokens=4", "--seed=1")
    assert written.exit_code == 0, written.output
    assert written.output.rstrip("\n").endswith("the end.")

    convert(folder, tmp_path / "full", "full", "float32")
    assert open_weights(tmp_path / "full", read_description(tmp_path / "full")).changed == []
    assert read_description(tmp_path / "full").val_loss is None
    weights = read_weights(tmp_path / "full")
    assert all(torch.equal(weight, theirs[name].float()) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["hf", "trained"])
def test_a_run_starts_from_an_export_and_from_one_trained_by_transformers(
    kind: str, others: Path, run: Path, codec: Codecs
) -> None:
    config = Config.model_validate(read_meta(next(run.rglob("step-*"))).config)
    model = ReverseGPT(config.model, codec().vocab_size)

    base = open_base(others / kind, model.shape, model.vocab_size, codec().format, "the run")
    base.fill(model)

    expected = stored(others / kind)["model.norm.weight"]
    assert torch.equal(model.model.norm.weight, expected)
    is_same = torch.equal(expected, stored(others / "hf")["model.norm.weight"])
    assert is_same == (kind == "hf")


def test_a_tokenizer_saved_by_transformers_needs_trust_remote_code(others: Path) -> None:
    from transformers import AutoTokenizer, LlamaTokenizer

    for load in (AutoTokenizer, LlamaTokenizer):
        with pytest.raises(Exception, match="trust_remote_code=True"):
            load.from_pretrained(others / "trained")


@pytest.mark.parametrize("kind", ["full", "hf"])
def test_a_full_or_hf_model_with_rewritten_weights_is_changed(
    kind: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(run, tmp_path / "model", kind, "float32")
    path = tmp_path / "model" / WEIGHTS
    halved = {name: weight / 2 for name, weight in load_file(path).items()}
    save_file(halved, path)

    weights = read_weights(tmp_path / "model")

    assert all(torch.equal(weight, halved[name]) for name, weight in weights.items())
    load_model_folder(tmp_path / "model", CPU)
    assert WEIGHTS in caplog.text


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def drop_a_tensor(path: Path) -> None:
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path)


@pytest.mark.parametrize("kind", ["full", "hf"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is not the file that was written"),
        (cut, "is truncated or altered"),
        (Path.unlink, "is missing"),
        (drop_a_tensor, "model.norm.weight is missing"),
    ],
    ids=["a bit", "cut", "gone", "a tensor"],
)
def test_damage_of_our_files_is_an_error(
    damage: Callable[[Path], None], message: str, kind: str, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    convert(run, folder, kind, "float32")
    damage(folder / WEIGHTS)

    for command, words in ((sample_command, ("--ending=x",)), (inspect_command, ("--verify",))):
        result = called(command, folder, *words)
        assert result.exit_code == CheckpointCorruptError.exit_code, result.output
        (line,) = [line for line in result.output.splitlines() if "error" in line]
        assert message in line
    with pytest.raises(CheckpointCorruptError, match=message):
        convert(folder, tmp_path / "other", "full", "float32")


@pytest.mark.parametrize(
    ("damage", "message"), [(cut, "is truncated"), (drop_a_tensor, "model.norm.weight is missing")]
)
def test_damage_of_another_programs_files_is_an_error(
    damage: Callable[[Path], None], message: str, others: Path, tmp_path: Path
) -> None:
    shutil.copytree(others / "trained", tmp_path / "model")
    damage(tmp_path / "model" / WEIGHTS)

    with pytest.raises(CheckpointCorruptError, match=message):
        load_model_folder(tmp_path / "model", CPU)


def lose_section(fields: dict[str, object]) -> None:
    del fields["megaback"]


def widen(fields: dict[str, object]) -> None:
    fields["intermediate_size"] = 64


def quantize(fields: dict[str, object]) -> None:
    fields["quantization_config"] = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lose_section, CheckpointCorruptError, "has lost its section 'megaback'"),
        (widen, RunMismatchError, "mlp_width is 64 for transformers"),
        (quantize, RunMismatchError, "quantization_config"),
    ],
)
def test_a_config_that_another_program_made_unusable_is_refused(
    change: Callable[[dict[str, object]], None],
    error: type[MegabackError],
    message: str,
    run: Path,
    tmp_path: Path,
) -> None:
    convert(run, tmp_path / "model", "hf", "float32")
    path = tmp_path / "model" / "config.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))

    with pytest.raises(error) as caught:
        load_model_folder(tmp_path / "model", CPU)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_errors_for_an_adapter_and_a_missing_tokenizer_have_advice(others: Path) -> None:
    with pytest.raises(CheckpointMissingError, match=r"megaback convert .*/adapter --base BASE"):
        read_description(others / "adapter")
    with pytest.raises(TokenizerError, match=r"no-tokenizer has no tokenizer .*megaback\.spm"):
        load_model_folder(others / "no-tokenizer", CPU)


def test_two_layouts_of_weights_in_one_folder_are_refused(others: Path, tmp_path: Path) -> None:
    shutil.copytree(others / "merged", tmp_path / "model")
    shutil.copy(others / "hf" / WEIGHTS, tmp_path / "model")

    with pytest.raises(CheckpointCorruptError, match=r"contains model\.safetensors beside"):
        load_model_folder(tmp_path / "model", CPU)


def as_earlier_versions_wrote_it(folder: Path) -> None:
    """Change a folder to the earlier format: hashes in config.json, no marks, tokenizer.model."""
    import hashlib

    path = folder / WEIGHTS
    save_file(load_file(path), path, metadata={"format": "pt"})
    data = path.read_bytes()
    fields = json.loads((folder / "config.json").read_text())
    section = fields.get("megaback", fields)
    section["version"] = 2
    section["files"] = {WEIGHTS: [len(data), hashlib.sha256(data).hexdigest()]}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "SHA256SUMS").unlink()
    if (folder / "megaback.spm").is_file():
        (folder / "megaback.spm").rename(folder / "tokenizer.model")


@pytest.mark.parametrize("kind", ["full", "hf"])
def test_a_folder_of_an_earlier_version_is_read(
    kind: str, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    convert(run, folder, kind, "float32")
    expected = read_weights(folder)
    as_earlier_versions_wrote_it(folder)

    weights = read_weights(folder)

    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    load_model_folder(folder, CPU)
    assert caplog.messages == []
    for words in ((), ("--verify",)):
        looked = called(inspect_command, folder, *words)
        assert looked.exit_code == 0, looked.output
        assert "changed" not in looked.output
    save_file({name: weight.half() for name, weight in expected.items()}, folder / WEIGHTS)
    load_model_folder(folder, CPU)
    assert "was changed" in caplog.text
