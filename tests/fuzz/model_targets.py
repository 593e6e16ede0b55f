"""Targets with torch: files of models, checkpoints and runs, and requests to a server."""

import asyncio
import json
import random
import shutil
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from data_targets import ALLOWED, Factory, small_codec
from engine import Target
from mutations import mutate_bytes, mutate_json, one_of, repacked

from data_pipeline.errors import MegabackError
from data_pipeline.text.codec import Direction
from megaback.checkpoints.safetensors_file import TensorFile
from megaback.config import ModelSection
from megaback.model.gpt import ReverseGPT
from megaback.run_folder import INDEX_NAME, MODEL_CONFIG_NAME, WEIGHTS_NAME
from megaback.weights.model_folder import (
    ModelDescription,
    load_model_folder,
    read_description,
    write_model_folder,
)
from megaback.weights.weight_files import StoredWeights
from tools.export.hf import write_hf_folder
from tools.serving.context import Service
from tools.serving.errors import ProblemError
from tools.serving.idle_timeout import IdleTimeoutConnection
from tools.serving.models import load_meeting, load_models
from tools.serving.parsing import REQUESTS, parse_body
from tools.serving.process import Server
from tools.serving.prometheus import Metrics
from tools.serving.request_limits import Limits
from tools.serving.worker import Engine

_SHAPE = ModelSection(num_layers=1, width=8, num_heads=2).resolved()
_CPU = torch.device("cpu")


def model_in(
    folder: Path,
    name: str,
    max_file_bytes: int = 1 << 30,
    direction: Direction = Direction.BACKWARD,
) -> Path:
    """A small model of random weights, as `megaback convert --to full` writes it."""
    codec = small_codec()
    text_format = replace(codec.format, direction=direction)
    model = ReverseGPT(_SHAPE, codec.vocab_size)
    model.initialize(1)
    out = folder / name
    out.mkdir()
    weights = dict(model.named_parameters())
    write_model_folder(
        out,
        ModelDescription(
            shape=_SHAPE,
            vocab_size=codec.vocab_size,
            context_tokens=32,
            text_format=text_format,
            step=1,
            val_loss=2.5,
        ),
        {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()},
        lambda name: weights[name].detach(),
        codec.model_bytes,
        max_file_bytes,
    )
    return out


def unpack_tensors(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    return {"header": json.loads(data[8 : 8 + size]), "data": data[8 + size :]}


def pack_tensors(parts: dict[str, Any]) -> bytes:
    header = json.dumps(parts["header"]).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + parts["data"]


def safetensors(folder: Path) -> Target:
    model = model_in(folder, "model")
    seed = (model / WEIGHTS_NAME).read_bytes()

    def run(data: bytes) -> None:
        (model / WEIGHTS_NAME).write_bytes(data)
        with suppress(MegabackError):
            tensors = TensorFile(model / WEIGHTS_NAME)
            for name in tensors.entries:
                tensors.tensor(name)
        weights = StoredWeights(model)
        for name, _shape in weights.shapes():
            weights.read(name)

    return Target("safetensors", run, [seed], repacked(unpack_tensors, pack_tensors), ALLOWED)


def weight_index(folder: Path) -> Target:
    model = model_in(folder, "model", 1 << 12)
    path = model / INDEX_NAME

    def run(data: bytes) -> None:
        path.write_bytes(data)
        list(StoredWeights(model).shapes())

    return Target("weight-index", run, [path.read_bytes()], mutate_json, ALLOWED)


def model_config(folder: Path) -> Target:
    """Configs of megaback's models, of exports for transformers, and of third-party Llamas."""
    full, stock = model_in(folder, "full"), folder / "hf"
    stock.mkdir()
    from megaback.weights.source import open_source

    write_hf_folder(stock, "tiny", open_source(full), torch.float32, 1 << 30)
    foreign = Path(shutil.copytree(full, folder / "foreign"))
    theirs = json.loads((stock / MODEL_CONFIG_NAME).read_text())
    del theirs["megaback"]
    (foreign / MODEL_CONFIG_NAME).write_text(json.dumps(theirs))
    places = (full, stock, foreign)

    def run(data: bytes) -> None:
        place = places[data[0] % len(places)] if data else full
        (place / MODEL_CONFIG_NAME).write_bytes(data[1:])
        read_description(place)
        load_model_folder(place, _CPU)

    def mutate(data: bytes, generator: random.Random) -> bytes:
        return data[:1] + mutate_json(data[1:], generator)

    seeds = [
        bytes([number]) + (place / MODEL_CONFIG_NAME).read_bytes()
        for number, place in enumerate(places)
    ]
    return Target("model-config", run, seeds, mutate, ALLOWED)


# Requests.

_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": "the end.",
        "max_tokens": 2,
        "n": 2,
        "logprobs": 2,
        "stop": ["x"],
        "seed": 1,
    },
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "the end."}],
        "max_tokens": 2,
        "stream": True,
    },
    "/v1/backchat": {"response": "the end.", "max_tokens": 2, "n": 2},
    "/v1/score": {"texts": ["the end.", "x"], "response": "y"},
    "/v1/infill": {
        "beginning": "the",
        "ending": "end.",
        "max_tokens": 2,
        "candidates": 2,
        "n": 1,
    },
}


def request_body(_folder: Path) -> Target:
    """Parsing of a request body, without a server."""
    paths = list(_BODIES)

    def run(data: bytes) -> None:
        if not data:
            return
        try:
            parse_body(REQUESTS[paths[data[0] % len(paths)]], data[1:])
        except ProblemError as problem:
            if not 400 <= problem.status < 500:
                raise RuntimeError(f"status {problem.status}") from None
            problem.response()

    def mutate(data: bytes, generator: random.Random) -> bytes:
        return data[:1] + mutate_json(data[1:], generator)

    seeds = [
        bytes([number]) + json.dumps(body).encode() for number, body in enumerate(_BODIES.values())
    ]
    return Target("request-body", run, seeds, mutate, ())


class _Transport(asyncio.Transport):
    """Transport of a client that reads everything."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = bytearray()
        self._is_closing = False
        self._socket, self._other = socket.socketpair()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        known = {
            "peername": ("127.0.0.1", 1),
            "sockname": ("127.0.0.1", 8000),
            "socket": self._socket,
        }
        return known.get(name, default)

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.sent += data

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True
        self._socket.close()
        self._other.close()

    abort = close

    def set_write_buffer_limits(self, *_limits: Any, **_named: Any) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Server:
    """The whole server except its sockets, on an event loop of this thread."""

    def __init__(self, folder: Path) -> None:
        backward = model_in(folder, "tiny")
        forward = model_in(folder, "ahead", direction=Direction.FORWARD)
        models = load_models(backward, forward, _CPU, torch.float32, 4)
        limits = Limits(tokens=4, request_s=2.0, body_s=0.2)
        metrics = Metrics()
        engine = Engine({name: one.batch for name, one in models.items()}, 64, metrics)
        infiller = load_meeting(models)
        server = Server(
            Service(
                models=models, engine=engine, limits=limits, metrics=metrics, infiller=infiller
            ),
            5,
        )
        self._config, self._state = server.config, server.server_state
        self._config.load()
        self._loop = asyncio.new_event_loop()
        self._lifespan = self._config.lifespan_class(self._config)
        self._loop.run_until_complete(self._lifespan.startup())

    def answer(self, data: bytes) -> bytes:
        """The response to a client that sends `data` and then closes the connection."""
        return self._loop.run_until_complete(self._answer(data))

    async def _answer(self, data: bytes) -> bytes:
        connection = IdleTimeoutConnection(
            self._config, self._state, self._lifespan.state, self._loop
        )
        transport = _Transport()
        connection.connection_made(transport)
        connection.data_received(data)
        for _ in range(400):
            await asyncio.sleep(0)
            if connection.is_idle or transport.is_closing():
                break
            await asyncio.sleep(0.005)
        connection.connection_lost(None)
        transport.close()
        for task in list(self._state.tasks):
            await asyncio.wait([task], timeout=5)
        return bytes(transport.sent)


def _raw(path: str, body: bytes, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def unpack_request(data: bytes) -> dict[str, Any]:
    head, _, body = data.partition(b"\r\n\r\n")
    line, *headers = head.split(b"\r\n")
    return {"line": line, "headers": [one.decode("latin-1") for one in headers], "body": body}


def pack_request(parts: dict[str, Any]) -> bytes:
    headers = [
        f"Content-Length: {len(parts['body'])}" if one.startswith("Content-Length") else str(one)
        for one in parts["headers"]
    ]
    head = "\r\n".join(headers).encode("latin-1", "replace")
    return parts["line"] + b"\r\n" + head + b"\r\n\r\n" + parts["body"]


def _change_body(data: bytes, generator: random.Random) -> bytes:
    parts = unpack_request(data)
    return pack_request(parts | {"body": mutate_json(parts["body"], generator)})


def request(folder: Path) -> Target:
    """Bytes on a connection, through uvicorn's parser, the guard and the application."""
    server = _Server(folder)
    logged: list[str] = []
    _collect_errors(logged)

    def run(data: bytes) -> None:
        if not data:  # would mean the end of the connection
            return
        logged.clear()
        answer = server.answer(data)
        status = answer[9:12]
        assert not logged, logged[0]
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:60]
        assert status not in (b"500", b"502"), answer[:300]

    seeds = [_raw(path, json.dumps(body).encode()) for path, body in _BODIES.items()]
    seeds += [_raw(path, b"", "GET") for path in ("/v1/models", "/health", "/", "/metrics")]
    ways = [_change_body, _change_body, repacked(unpack_request, pack_request, 1.0), mutate_bytes]
    return Target("request", run, seeds, one_of(ways), ())


def _collect_errors(logged: list[str]) -> None:
    import logging

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(logging.Formatter().format(record))

    for name in ("uvicorn.error", "megaback.serve", "asyncio"):
        logging.getLogger(name).addHandler(Collect(logging.ERROR))


TARGETS: dict[str, Factory] = {
    "safetensors": safetensors,
    "weight-index": weight_index,
    "model-config": model_config,
    "request-body": request_body,
    "request": request,
}
