"""Metadata of a card, as huggingface_hub parses it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard

from data_pipeline.text.codec import Direction, TextCodec
from megaback.origins import Import, WeightsIdentity
from megaback.run_folder import META_NAME
from megaback.weights.identity import Training
from megaback.weights.model_folder import ModelDescription
from megaback.weights.source import open_checkpoint
from tests.helpers.exports import write_checkpoint
from tools.convert import convert, main
from tools.export.card_metadata import card_metadata

FINGERPRINT = "ab" * 32


@pytest.fixture(scope="module")
def described(
    tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]
) -> ModelDescription:
    run = tmp_path_factory.mktemp("described") / "run"
    write_checkpoint(run, codec())
    return open_checkpoint(run).description


def parsed(description: ModelDescription, license_id: str | None = None) -> ModelCard:
    return ModelCard(card_metadata(description, "my-model", license_id) + "# Text\n")


def test_the_hub_reads_license_base_and_val_losses(described: ModelDescription) -> None:
    """With names that YAML would read as something else."""
    data = 'it\'s "a: [b]", data/novels x 2'
    training = Training(
        data=f"{data}; fingerprint {FINGERPRINT}",
        base="hf://me/base-7b/checkpoints",
        val_bits_per_byte=1.25,
    )
    card = parsed(replace(described, training=training), "apache-2.0").data

    assert (card.license, card.base_model, card.library_name) == (
        "apache-2.0",
        "me/base-7b",
        "transformers",
    )
    assert card.model_name == "my-model"
    loss, bits = card.eval_results
    assert (loss.metric_type, loss.metric_value) == ("loss", described.val_loss)
    assert (bits.metric_type, bits.metric_value) == ("bits_per_byte", 1.25)
    assert (loss.dataset_name, loss.dataset_revision, loss.dataset_split) == (
        data,
        FINGERPRINT,
        "val",
    )
    assert (loss.task_type, card.pipeline_tag) == ("text-generation", None)


def test_unknown_facts_are_omitted(described: ModelDescription) -> None:
    training = Training(data="data/novels", base="runs/base")
    for description in (
        replace(described, training=None),
        replace(described, training=training, val_loss=None),
    ):
        fields = yaml.safe_load(card_metadata(description, "x", None).split("---\n")[1])
        assert fields == {"library_name": "transformers", "tags": ["megaback", "backward"]}
    (loss,) = parsed(replace(described, training=training)).data.eval_results
    assert loss.dataset_revision is None
    forward = replace(
        described, text_format=replace(described.text_format, direction=Direction.FORWARD)
    )
    assert parsed(forward).data.pipeline_tag == "text-generation"


def test_the_base_of_an_imported_model_is_where_it_was_read_or_what_its_folder_says(
    described: ModelDescription,
) -> None:
    cached = "/cache/hub/models--Qwen--Qwen3-0.6B--Base/snapshots/0123abc"
    for path, base in (
        (cached, "Qwen/Qwen3-0.6B--Base"),
        ("models--Qwen--Qwen3-0.6B/snapshots/0123/", "Qwen/Qwen3-0.6B"),
        ("hf://Qwen/Qwen3-0.6B@0123abc", "Qwen/Qwen3-0.6B"),
        ("models/Qwen3-0.6B", "Qwen/Qwen3-Base"),
    ):
        imported = Import(
            base=WeightsIdentity(path=path), kind="transformers", base_on_hub="Qwen/Qwen3-Base"
        )
        assert parsed(replace(described, imported=imported)).data.base_model == base


def test_a_gguf_file_has_the_facts_of_its_card(
    tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    run = tmp_path / "run"
    target, _ = write_checkpoint(
        run, codec(), shards=Path("data/novels"), init_from="hf://me/base-7b/checkpoints"
    )
    meta = json.loads((target / META_NAME).read_text())
    (target / META_NAME).write_text(json.dumps({**meta, "data_fingerprint": FINGERPRINT}))
    for name in ("float32", "q8_0"):
        convert(run, tmp_path / name, "gguf", name, license_id="apache-2.0")
    fields = {
        key: field.contents()
        for key, field in gguf.GGUFReader(tmp_path / "float32/model.gguf").fields.items()
        if key.startswith("general.")
    }
    assert fields["general.license"] == "apache-2.0"
    assert fields["general.tags"] == ["megaback", "backward"]
    assert fields["general.base_model.0.organization"] == "me"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/me/base-7b"
    assert fields["general.dataset.0.name"] == "data/novels"
    assert fields["general.dataset.0.version"] == FINGERPRINT

    card, quantized = (
        ModelCard.load(tmp_path / name / "README.md") for name in ("float32", "q8_0")
    )
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "me/base-7b")
    assert card.data.library_name == "gguf"
    assert [one.metric_value for one in card.data.eval_results] == [2.5]
    assert quantized.data.eval_results is None
    assert "before they were quantized" in quantized.text
    assert f"Data: `data/novels; fingerprint {FINGERPRINT}`" in card.text


def test_an_export_of_a_run_has_its_data_base_and_bits_per_byte(
    tmp_path: Path, codec: Callable[..., TextCodec]
) -> None:
    """Through a full model too, which has no metrics beside it."""
    run = tmp_path / "run"
    write_checkpoint(run, codec(), shards=Path("data/novels"), init_from="runs/base")
    (run / "metrics.jsonl").write_text(
        '{"step": 20, "val_loss": 3.0, "val_bits_per_byte": 1.9}\n'
        '{"step": 30, "val_loss": 2.5, "val_bits_per_byte": 1.6}\n'
    )
    convert(run, tmp_path / "full", "full", "float32")
    convert(tmp_path / "full", tmp_path / "hf", "hf", "float32", license_id="mit")

    text = (tmp_path / "hf" / "README.md").read_text()
    card = ModelCard.load(tmp_path / "hf" / "README.md").data
    assert [one.metric_value for one in card.eval_results] == [2.5, 1.6]
    assert card.license == "mit"
    assert "Fine-tuned from `runs/base`" in text
    assert "Data: `data/novels`" in text


def test_a_license_that_the_hub_could_not_name_is_refused(tmp_path: Path) -> None:
    for words, message in (
        (("--to", "hf", "--license", "My License"), "identifier of the hub's licenses"),
        (("--to", "full", "--license", "mit"), "for the cards of hf, gguf and peft"),
    ):
        result = CliRunner().invoke(main, [str(tmp_path), "--out", str(tmp_path / "out"), *words])
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
