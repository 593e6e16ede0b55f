"""Texts of a model on a server equal those of the model here."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import megaback
from data_pipeline.text.codec import TextCodec
from megaback import SamplingOptions, errors
from tests.helpers.server import Running, serving, tiny_models
from tools.convert import convert
from tools.serving.models import ServedModel

Codecs = Callable[..., TextCodec]
ENDINGS = ["and said nothing about it.", "Café – ☃", "", "is of the"]
_LLAMA_CPP = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = sys.argv[1], 64, False, -1
params.cpuparams.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("\\nlistening:", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("remote"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def llama_cpp(
    models: dict[str, ServedModel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of llama.cpp's server with the model `tiny`."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    folder = tmp_path_factory.mktemp("llama")
    convert(models["tiny"].folder, folder / "model", "gguf", "float32")
    command = [sys.executable, "-c", _LLAMA_CPP, folder / "model" / "model.gguf"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("listening"))
        process.kill()


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(24, temperature=0),
        SamplingOptions(100, seed=6, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
        SamplingOptions(
            24, seed=7, temperature=2.0, min_new_tokens=20, stop_ids=tuple(range(300, 400))
        ),
    ],
    ids=["greedy", "beyond the context", "ids that end it"],
)
def test_megaback_serve_gives_the_texts_of_a_writer(
    running: Running, models: dict[str, ServedModel], options: SamplingOptions
) -> None:
    for name, ending in (("tiny", ENDINGS), ("ahead", ENDINGS[:2])):
        folder = models[name].folder
        here = megaback.load(folder, device="cpu", dtype="float32")
        there = megaback.remote(running.url, folder)
        assert there.complete_many(ending, options) == here.complete_many(ending, options)


def test_a_stream_has_whole_texts_that_grow_to_the_left(
    running: Running, models: dict[str, ServedModel]
) -> None:
    writer = megaback.remote(f"{running.url}/v1", models["tiny"].folder)
    options = SamplingOptions(20, seed=3)
    *begun, last = writer.stream(["the wall.", "é"], options)
    assert last == writer.complete_many(["the wall.", "é"], options)
    assert len(begun) > 10
    for before, after in zip(begun, [*begun[1:], last], strict=True):
        assert all(new.endswith(old) for old, new in zip(before, after, strict=True))
    assert begun[0][0].endswith("the wall.")
    assert writer.complete_backwards("the wall.", max_new_tokens=20, seed=3) == last[0]


def test_what_is_not_the_served_model_is_refused(
    running: Running, models: dict[str, ServedModel]
) -> None:
    folder = models["tiny"].folder
    url, file = running.url, folder / "tokenizer.model"
    with pytest.raises(errors.ConfigError, match="give the model's `direction` too"):
        megaback.remote(url, file)
    with pytest.raises(errors.DirectionMismatchError, match="has unit token, and the given one wo"):
        megaback.remote(url, file, direction="backward", unit="word")
    assert megaback.remote(url, file, direction="forward").server.name == "ahead"
    with pytest.raises(errors.ConfigError, match="has no model 'huge', only tiny, ahead"):
        megaback.remote(url, folder, model="huge")
    with pytest.raises(errors.DirectionMismatchError, match="use complete_backwards"):
        megaback.remote(url, folder).complete_forwards("a")
    with pytest.raises(errors.PromptError, match="give a list of texts"):
        megaback.remote(url, folder).complete_many("the end.")
    with pytest.raises(errors.ServeError, match=r"answers 400: .*max_tokens"):
        megaback.remote(url, folder).complete_backwards("a", max_new_tokens=10_000)


def test_llama_cpp_gives_the_greedy_texts_of_a_writer(
    llama_cpp: str, models: dict[str, ServedModel]
) -> None:
    folder = models["tiny"].folder
    here = megaback.load(folder, device="cpu", dtype="float32")
    there = megaback.remote(llama_cpp, folder)
    options = SamplingOptions(24, temperature=0, min_new_tokens=20)
    assert there.complete_many(ENDINGS, options) == here.complete_many(ENDINGS, options)
    *begun, last = there.stream(ENDINGS[:1], options)
    assert begun
    assert last == here.complete_many(ENDINGS[:1], options)
    # More than the context, which slides; other numbers are drawn than here, the same each time.
    long = SamplingOptions(80, seed=4, repetition_penalty=1.1, min_new_tokens=80)
    text = there.complete_many(["the wall."], long)
    assert text == there.complete_many(["the wall."], long)
    assert len(there.codec.encode(text[0])) > 64
    with pytest.raises(errors.BackendError, match=r"llama\.cpp at .* gives no probabilities"):
        megaback.load_scorer(folder, server=llama_cpp)
