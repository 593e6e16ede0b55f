"""Claims of docs/serve.md that no other test of the server covers."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.text.codec import TextCodec
from megaback.inference import decoder
from megaback.inference.decoder import Decoder
from megaback.inference.generate import complete
from megaback.inference.infill.infiller import InfillOptions
from megaback.inference.sampling import SamplingOptions
from tests.helpers.paths import ROOT
from tests.helpers.server import CONTEXT_TOKENS, Running, serving, tiny_models
from tools.serve import main
from tools.serving import (
    completions,
    idle_timeout,
    middleware,
    parsing,
    process,
    request_limits,
    schemas,
)
from tools.serving.models import ServedModel, load_meeting
from tools.serving.process import Server
from tools.serving.request_limits import Limits

Codecs = Callable[..., TextCodec]
PAGE = (ROOT / "docs" / "serve.md").read_text()
ENDING = "and said nothing about it."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def models(folder: Path, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(folder, codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


def choice(running: Running, **body: Any) -> dict[str, Any]:
    answer = running.post("/v1/completions", {"prompt": ENDING, "max_tokens": 30, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.4},
        {"top_k": 3, "temperature": 2.0},
        {"min_p": 0.2, "temperature": 1.5},
        {"repetition_penalty": 3.0, "temperature": 0.0},
    ],
)
def test_sampling_options_match_those_of_the_sampler(
    running: Running, models: dict[str, ServedModel], options: dict[str, float]
) -> None:
    model = models["tiny"]
    sampling = SamplingOptions(30, **{"temperature": 1.0, "top_k": 0, "seed": 5, **options})
    whole = complete(model.decoder, model.codec, ENDING, CONTEXT_TOKENS, sampling)
    found = choice(running, seed=5, echo=True, **options)["text"]
    assert found == whole.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_the_returned_seed_reproduces_the_answer(running: Running) -> None:
    body = {"prompt": ENDING, "max_tokens": 20, "temperature": 2.0}
    first = running.post("/v1/completions", body).json()
    again = running.post("/v1/completions", {**body, "seed": first["seed"]}).json()
    assert again["choices"] == first["choices"]


def test_a_stop_text_ends_a_sample_that_ignores_eos(running: Running) -> None:
    asked = {"ignore_eos": True, "seed": 2}
    free = choice(running, **asked)["text"]
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    found = choice(running, **asked, stop=stop)
    assert (found["finish_reason"], len(found["text"]) < len(free)) == ("stop", True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a", "suffix": "b"}),
        ("completions", {"prompt": "a", "frequency_penalty": 0.5}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": []}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}),
    ],
)
def test_unsupported_fields_are_rejected_by_name(
    running: Running, path: str, body: dict[str, Any]
) -> None:
    answer = running.post(f"/v1/{path}", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{list(body)[1]}: ")


def test_models_have_a_unit_and_a_context_and_scores_bits_per_byte(
    running: Running, models: dict[str, ServedModel]
) -> None:
    first = running.get("/v1/models").json()["data"][0]
    assert (first["id"], first["unit"], first["context_tokens"]) == ("tiny", "token", 64)
    text = "the last map \u00e9."
    (score,) = running.post("/v1/score", {"texts": [text]}).json()["scores"]
    bits = -score["log_probability"] / 0.6931471805599453
    assert score["bits_per_byte"] == pytest.approx(bits / len(text.encode()))


def test_metrics_contain_no_text_of_requests(running: Running) -> None:
    secret = "a lantern of no one"
    choice(running, prompt=secret, stop="quarrelsome", user="somebody")
    running.post(f"/v1/{secret}", {"prompt": secret})
    exposed = running.get("/metrics").text
    assert [word for word in ("lantern", "quarrelsome", "somebody") if word in exposed] == []


def test_health_is_503_after_the_engine_closes(models: dict[str, ServedModel]) -> None:
    with serving(models) as running:
        assert running.get("/health").json() == {"status": "ok"}
        running.service.engine.close()
        assert running.get("/health").status_code == 503


def test_infill_loads_packed_models_again(models: dict[str, ServedModel]) -> None:
    infiller = load_meeting(models)
    assert infiller is not None
    for reader, name in ((infiller.backward, "tiny"), (infiller.forward, "ahead")):
        assert models[name].decoder.model is None
        assert reader.decoder is not models[name].decoder
        assert reader.model.num_parameters() == models[name].decoder.num_parameters


def test_infill_shares_the_weights_of_models_that_are_not_packed(
    models: dict[str, ServedModel], tmp_path: Path, codec: Codecs, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = load_meeting(models)
    monkeypatch.setattr(decoder, "_can_pack", lambda *_: False)  # as on a GPU
    served = tiny_models(tmp_path, codec)

    infiller = load_meeting(served)

    assert infiller is not None
    assert packed is not None
    for reader, name in ((infiller.backward, "tiny"), (infiller.forward, "ahead")):
        assert reader.decoder is served[name].decoder
        assert reader.model is reader.decoder.model
        storages = {one.untyped_storage().data_ptr() for one in reader.model.parameters()}
        assert len(storages) < len(list(reader.model.parameters()))  # some share a product's weight
    asked = ("the old", "the last map.", InfillOptions(6, sampling=SamplingOptions(seed=4)))
    expected, found = packed.fill(*asked), infiller.fill(*asked)
    assert [one.middle for one in found] == [one.middle for one in expected]


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    original = Decoder.step

    def step(decoder: Decoder, *arguments: Any) -> Any:
        time.sleep(seconds)
        return original(decoder, *arguments)

    monkeypatch.setattr(Decoder, "step", step)


@pytest.mark.parametrize("order", ["reading", "writing"])
def test_a_stream_sends_comments_while_no_text_is_ready(
    running: Running, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions, "_SECONDS_BETWEEN_SIGNS_OF_LIFE", 0.1)
    # In reading order, text is sent only at the end; in writing order, each step is slow.
    slow_steps(monkeypatch, 0.03 if order == "reading" else 0.25)
    body: dict[str, Any] = {"prompt": ENDING, "stream": True, "stream_order": order}
    body["ignore_eos"] = True
    body["max_tokens"] = 16 if order == "reading" else 3
    lines = running.post("/v1/completions", body).text.split("\n\n")
    assert lines.count(": still writing") >= 2
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_infill_writes_for_at_most_half_of_its_deadline(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    infiller = load_meeting(models)
    body = {"beginning": "the old", "ending": "the map.", "candidates": 2, "max_tokens": 40}
    slow_steps(monkeypatch, 0.05)  # 40 tokens of two models: 4 s
    with serving(models, Limits(request_s=3), infiller=infiller) as running:
        assert running.post("/v1/infill", body).status_code == 200
        written = running.get("/metrics").text
    found = re.findall(r"megaback_written_tokens_total\{.*\} (\S+)", written)
    assert len(found) == 2
    assert all(1 <= float(tokens) <= 2 * 31 for tokens in found)


def test_limits_equal_those_of_the_docs(models: dict[str, ServedModel]) -> None:
    """Numbers of docs/serve.md and of the code; other tests check that the limits hold."""
    documented = {
        r"`--max-body-bytes` \| (\S+) MiB": Limits.body_bytes >> 20,
        r"`--max-new-tokens`, of a sample \| (\S+) ": Limits.tokens,
        r"`--max-requests`, open at once \| (\S+) ": Limits.open_requests,
        r"samples that wait \| (\S+) times": Limits.waiting_samples / Limits.open_requests,
        r"`--max-seconds`, of a request \| (\S+) ": Limits.request_s,
        r"\| prompts × `n` \| (\S+) ": schemas.MAX_SAMPLES,
        r"echoed prompts included \| (\S+) ": request_limits.MAX_ANSWER_NUMBERS,
        r"echoed prompts × `n` \| (\S+) ": request_limits.MAX_ECHOED_CHARACTERS,
        r"\| `logprobs` \| (\S+) ": schemas.MAX_LIKELIEST,
        r"`stop` \| (\S+) texts": schemas.MAX_STOPS,
        r"64; 64; 256; (\S+) ": request_limits.MAX_INFILL_TOKENS,
        r"messages \| (\S+); ": parsing._MAX_FIELDS,
        r"line and headers \| (\S+) KiB": middleware._MAX_HEAD_BYTES >> 10,
        r"KiB, within (\S+) s": idle_timeout.SECONDS_FOR_A_REQUEST,
        r"body's arrival \| (\S+) s": Limits.body_s,
        r"an answer, of (\S+) KiB": middleware._PART_BYTES >> 10,
        r"not read \| (\S+) s": idle_timeout.SECONDS_FOR_A_PART,
        r"without a request \| (\S+) s": idle_timeout.SECONDS_FOR_A_REQUEST,
        r"idle one beyond (\S+) ": idle_timeout.MAX_CONNECTIONS,
        r"keeps (\S+) KiB": idle_timeout.SYSTEM_BUFFER_BYTES >> 10,
        r"have (\S+) s more": process._SECONDS_TO_FINISH,
        r"silent for (\S+) s": completions._SECONDS_BETWEEN_SIGNS_OF_LIFE,
    }
    for pattern, value in documented.items():
        found = re.findall(pattern, PAGE)
        assert [float(one.rstrip(",").replace(",", "")) for one in found] == [value], pattern
    with serving(models) as running:
        assert isinstance(running.server, Server)
        keep_alive = running.server.config.timeout_keep_alive
    assert f"after an answer {keep_alive} s" in PAGE
    options = {option.name: option.default for option in main.params}
    assert (options["slots"], options["shutdown_seconds"]) == (16, 30.0)
    assert "`--slots` of each model at a time (16)" in PAGE
    assert "`--shutdown-seconds` (30)" in PAGE
    assert options["max_requests"] == Limits.open_requests
    assert options["max_body_bytes"] == Limits.body_bytes
    assert options["max_new_tokens"] == Limits.tokens
    assert options["max_seconds"] == Limits.request_s
