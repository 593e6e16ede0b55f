"""`megaback import model` on checkpoints that DeepSpeed and transformers have written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from launcher.ranks.local import rank_names
from megaback.model.attention import Segments
from megaback.weights.converted import model_folder
from megaback.weights.deepspeed_checkpoint import DeepSpeedWeights
from megaback.weights.deepspeed_files import checkpoint_folder
from megaback.weights.model_folder import load_model_folder, read_description
from tests.helpers.bpe import NUM_IDS, qwen_content
from tests.helpers.deepspeed_worker import CASES, HEADS, SHAPE
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment, val_losses_of
from tools.convert import convert
from tools.import_model import main as import_command

Run = subprocess.CompletedProcess[str]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder with the cases' checkpoints, transformers' config and a tokenizer."""
    folder = tmp_path_factory.mktemp("deepspeed")
    tokenizer = (tiny_shards / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(tokenizer)
    vocab_size = vocabulary(folder)
    fields = {"model_type": "qwen3", "vocab_size": vocab_size, "rms_norm_eps": 1e-6}
    fields |= {**SHAPE, **HEADS, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(fields))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.deepspeed_worker", folder, str(vocab_size)],
            env={**training_environment(), **names},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for names in rank_names(2)
    ]
    printed = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    return folder


def vocabulary(folder: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    size: int = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    return size


@pytest.mark.parametrize("name", CASES)
def test_weights_equal_those_of_zero_to_fp32_bit_for_bit(name: str, saved: Path) -> None:
    expected = load_file(saved / name / "expected.safetensors")

    weights = DeepSpeedWeights(checkpoint_folder(saved / name))

    assert weights.step == 2
    shapes = dict(weights.shapes())
    assert shapes.keys() == expected.keys()
    for key, weight in expected.items():
        found = weights.read(key)
        assert shapes[key] == tuple(weight.shape)
        assert torch.equal(found, weight)
        assert (found.dtype, weights.dtype(key)) == (weight.dtype, weight.dtype)


@torch.no_grad()
def test_an_imported_checkpoint_has_the_logits_of_transformers(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, Qwen3ForCausalLM

    words = ("stage-3", "--config", ".", "--tokenizer", ".", "--direction", "backward")
    out = tmp_path / "model"
    with pytest.MonkeyPatch.context() as context:
        context.chdir(saved)
        result = CliRunner().invoke(import_command, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "stage-3/global_step2 (DeepSpeed, ZeRO stage 3): Qwen3 with 2 layers" in result.output

    model, description, codec = load_model_folder(out, torch.device("cpu"))

    assert isinstance(codec, TextCodec)
    assert (description.text_format.direction.value, description.step) == ("backward", 2)
    stock = Qwen3ForCausalLM(AutoConfig.from_pretrained(saved)).eval()
    stock.load_state_dict(load_file(saved / "stage-3" / "expected.safetensors"), strict=False)
    ids_T = torch.arange(3, 43)
    logits_TV = model.logits(ids_T, torch.arange(40), Segments.from_lengths((40,), ids_T.device))
    torch.testing.assert_close(logits_TV, stock(ids_T[None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers' own Qwen3 and what is imported of it, for each direction."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(5)
    fields = {**SHAPE, **HEADS, "vocab_size": NUM_IDS, "rms_norm_eps": 1e-6}
    Qwen3ForCausalLM(Qwen3Config(**fields)).save_pretrained(folder / "theirs")
    (folder / "theirs" / "tokenizer.json").write_bytes(qwen_content())
    for direction in ("forward", "backward"):
        words = (folder / "theirs", "--direction", direction, "--context-tokens", 64)
        words = (*words, "--out", folder / direction)
        result = CliRunner().invoke(import_command, [str(word) for word in words])
        assert result.exit_code == 0, result.output
    return folder


@torch.no_grad()
def logits_of(folder: Path, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Ours of a model folder, and transformers' of its export."""
    from transformers import AutoModelForCausalLM

    convert(folder, out := folder.with_name(f"{folder.name}-hf"), "hf", "float32")
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    model, *_ = load_model_folder(model_folder(folder), torch.device("cpu"))
    segments = Segments.from_lengths((len(ids),), torch.device("cpu"))
    ids_T = torch.tensor(ids)
    ours_TV = model.logits(ids_T, torch.arange(len(ids)), segments)
    return ours_TV, stock(ids_T[None]).logits[0]


@torch.no_grad()
def test_a_model_imported_forward_has_its_logits_when_exported_again(qwen: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = list(range(0, NUM_IDS, 17))
    stock = AutoModelForCausalLM.from_pretrained(qwen / "theirs").eval()

    ours_TV, exported_TV = logits_of(qwen / "forward", ids)

    expected_TV = stock(torch.tensor(ids)[None]).logits[0]
    assert torch.equal(exported_TV[:, :NUM_IDS], expected_TV)
    torch.testing.assert_close(ours_TV[:, :NUM_IDS], expected_TV, atol=1e-5, rtol=1e-5)


def test_a_model_of_others_is_trained_backward_and_exported(
    qwen: Path, tiny_text_folder: Path, train_one_rank: Callable[..., Run]
) -> None:
    from transformers import AutoTokenizer

    codec = TextCodec.load(qwen / "backward" / "tokenizer.json", Direction.BACKWARD, Unit.TOKEN)
    settings = BuildSettings(
        sources=(WeightedSource(str(tiny_text_folder)),),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        val_fraction=0.1,
        frame_tokens=1024,
    )
    build_shards(settings, codec, qwen / "shards", workers=1)
    options = (f"init_from={qwen / 'backward'}", f"data.shards={qwen / 'shards'}", "model=null")

    options = (*options, "optimizer.warmup_steps=0")
    for steps in (12, 13):  # a resume, which no longer reads the base
        result = train_one_rank(qwen / "run", *options, f"training.steps={steps}")
        assert result.returncode == 0, result.stderr
    losses = val_losses_of(qwen / "run")
    assert losses[12] < losses[0] - 0.5
    text = "  naïve ☃ 1871.\n\nThe end"
    ids = [codec.begin_id, *codec.encode(text).tolist()]
    ours_TV, exported_TV = logits_of(qwen / "run", ids)
    torch.testing.assert_close(ours_TV, exported_TV, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(qwen / "run-hf", trust_remote_code=True)
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    imported = read_description(qwen / "run-hf").imported
    assert imported == read_description(qwen / "backward").imported is not None
