"""Exports have the logits of the trained engine, for every ZeRO stage and number of ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from data_pipeline.text.codec import TextCodec
from launcher.ranks.local import rank_names
from megaback.model.attention import Segments
from megaback.run_folder import GGUF_NAME
from megaback.weights.model_folder import load_model_folder
from tests.helpers.exports import NUM_IDS, STAGES, TIED
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import tiny_config, training_environment
from tools.convert import convert

pytestmark = pytest.mark.slow

_WORKER = "tests.helpers.export_worker"
_FP32_TOLERANCE = 1e-5
ENDING = "  and so\tit ended – in 1871 ☃.\n\nThe end"
CUTS = [(size, stage, name) for size in (1, 2) for stage in STAGES for name in TIED.values()]
Cut = tuple[int, int, str]
cuts = pytest.mark.parametrize(("world_size", "stage", "name"), CUTS)
TrainedOf = Callable[[int], Path]
ExportOf = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> TrainedOf:
    """`trained(world_size)`: a folder of runs, and of their engines' logits of some ids."""

    @cache
    def of(world_size: int) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        (folder / "config.yaml").write_text(yaml.safe_dump(tiny_config(tiny_shards)))
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", _WORKER, folder / "config.yaml", folder],
                env={**training_environment(), "PYTHONWARNINGS": "ignore", **variables},
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for variables in rank_names(world_size)
        ]
        printed = [rank.communicate(timeout=200)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world_size, printed
        return folder

    return of


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> ExportOf:
    """`export(run, kind)`: a run's export, with weights in files of at most 50 kB."""

    @cache
    def of(run: Path, kind: str) -> Path:
        out = tmp_path_factory.mktemp("exports") / f"{run.name}-{kind}"
        convert(run, out, kind, "float32", max_file_bytes=50_000)
        return out

    return of


def noted(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    tensors = load_file(folder / f"{name}.safetensors")
    return tensors["ids"], tensors["logits"]


@cuts
@torch.no_grad()
def test_a_full_export_has_the_logits_of_the_engine(
    world_size: int, stage: int, name: str, trained: TrainedOf, export: ExportOf
) -> None:
    ids_T, expected_TV = noted(trained(world_size), f"{name}-{stage}")
    folder = export(trained(world_size) / f"{name}-{stage}", "full")
    model, *_ = load_model_folder(folder, torch.device("cpu"))

    logits_TV = model.logits(
        ids_T, torch.arange(len(ids_T)), Segments.from_lengths((len(ids_T),), ids_T.device)
    )

    assert len(list(folder.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits_TV, expected_TV, atol=_FP32_TOLERANCE, rtol=0)


@cuts
@torch.no_grad()
def test_a_hugging_face_export_has_the_logits_of_the_engine_in_stock_classes(
    world_size: int, stage: int, name: str, trained: TrainedOf, export: ExportOf
) -> None:
    ids_T, expected_TV = noted(trained(world_size), f"{name}-{stage}")
    folder = export(trained(world_size) / f"{name}-{stage}", "hf")
    model = AutoModelForCausalLM.from_pretrained(folder)

    logits_TV = model(ids_T[None]).logits[0]

    expected_class = "Qwen3ForCausalLM" if name == "tied" else "LlamaForCausalLM"
    assert type(model).__name__ == expected_class
    torch.testing.assert_close(logits_TV, expected_TV, atol=_FP32_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def llama_cpp(
    trained: TrainedOf,
    export: ExportOf,
    codec: Callable[..., TextCodec],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Cut, tuple[Tensor, Tensor]]:
    """Log probabilities of llama.cpp and of the engine after each of some prefixes."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    expected, asked = {}, []
    for world_size, stage, name in CUTS:
        run = trained(world_size) / f"{name}-{stage}"
        ids_T, logits_TV = noted(run.parent, run.name)
        likeliest = codec().piece_num_bytes()[logits_TV.argmax(-1)]
        # The server omits ids whose bytes are not a whole character.
        count = max(n for n in range(1, NUM_IDS + 1) if likeliest[n - 1] > 1)
        expected[world_size, stage, name] = logits_TV[count - 1].log_softmax(-1)
        asked.append([str(export(run, "gguf") / GGUF_NAME), ids_T[:count].tolist()])
    path = tmp_path_factory.mktemp("llama") / "process.py"
    path.write_text(_LLAMA_CPP_PROCESS)
    result = subprocess.run(
        [sys.executable, path, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[")]
    found = map(torch.tensor, json.loads(line))
    return {cut: (found_V, expected[cut]) for cut, found_V in zip(CUTS, found, strict=True)}


@cuts
def test_llama_cpp_has_the_log_probabilities_of_the_engine(
    world_size: int, stage: int, name: str, llama_cpp: dict[Cut, tuple[Tensor, Tensor]]
) -> None:
    found_V, expected_V = llama_cpp[world_size, stage, name]

    assert expected_V.std() > 0.1
    torch.testing.assert_close(found_V, expected_V, atol=_FP32_TOLERANCE, rtol=0)


_LLAMA_CPP_PROCESS = """
import json, os, sys
import xllamacpp

def log_probabilities(path, ids):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 64, False, -1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 600}
    answer = xllamacpp.Server(params).handle_completions(request)
    (place,) = answer["choices"][0]["logprobs"]["content"]
    by_id = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
    return [by_id[number] for number in range(600)]

print()
print(json.dumps([log_probabilities(*asked) for asked in json.loads(sys.argv[1])]), flush=True)
os._exit(0)  # its threads do not end by themselves
"""

_FOREIGN_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ending, copy = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokenizer.save_pretrained(copy)
tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = model.generate(**tokenizer.prompt(ending), do_sample=False, max_new_tokens=24)[0]
asked = tokenizer.chat_prompt(ending.strip())
answer = model.generate(**asked, do_sample=False, max_new_tokens=20)[0]
print(json.dumps({
    "written": tokenizer.written(answer),
    "text": tokenizer.decode(ids, skip_special_tokens=True),
    "new": ids.tolist(),
    "encoded": tokenizer(ending)["input_ids"],
    "round": tokenizer.decode(tokenizer(ending)["input_ids"], skip_special_tokens=True),
    "batch": tokenizer([ending, "end"], padding=True)["input_ids"],
    "megaback": [name for name in sys.modules if name.startswith(("megaback", "data_pipeline"))],
}))
"""


def test_a_process_without_megaback_writes_the_greedy_sample(
    trained: TrainedOf,
    export: ExportOf,
    run_megaback: Callable[..., "subprocess.CompletedProcess[str]"],
    tmp_path: Path,
    codec: Callable[..., TextCodec],
) -> None:
    run = trained(1) / "untied-3"
    sampled = run_megaback(
        "sample", export(run, "full"), "--ending", ENDING, "--temp", "0", "--max-new-tokens", "24"
    )
    assert sampled.returncode == 0, sampled.stderr
    asked = run_megaback(
        "chat",
        export(run, "full"),
        "--response",
        ENDING.strip(),
        "--temp",
        "0",
        "--max-new-tokens",
        "20",
    )
    assert asked.returncode == 0, asked.stderr
    (tmp_path / "process.py").write_text(_FOREIGN_PROCESS)
    hf_home = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}

    result = subprocess.run(
        [sys.executable, "-P", "process.py", export(run, "hf"), ENDING, tmp_path / "copy"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, **hf_home},
        timeout=200,
    )

    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["text"] + "\n" == sampled.stdout
    assert asked.stdout.startswith(f"Instruction: {found['written']}")
    assert found["megaback"] == []
    begin = codec().begin_id
    assert found["encoded"] == [begin, *codec().encode(ENDING).tolist()]
    assert found["round"] == ENDING
    padded = found["batch"][1]
    assert padded[-2:] == [begin, *codec().encode("end").tolist()][-2:]
    assert len(padded) == len(found["batch"][0])
