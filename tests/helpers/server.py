"""Test server: a tiny model behind real sockets, in a thread of this process."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.config import ModelSection
from megaback.inference.generate import generate
from megaback.inference.infill.infiller import Infiller
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from megaback.weights.model_folder import ModelDescription, write_model_folder
from tools.serve import listening_socket
from tools.serving.context import Service
from tools.serving.host_names import Address
from tools.serving.models import ServedModel, load_models
from tools.serving.process import Server
from tools.serving.prometheus import Metrics
from tools.serving.request_limits import Limits
from tools.serving.worker import Engine

CONTEXT_TOKENS = 64
SHAPE = ModelSection(num_layers=2, width=16, num_heads=2).resolved()


def write_tiny_model(
    folder: Path,
    codec: TextCodec,
    shape: ModelSection = SHAPE,
    context_tokens: int = CONTEXT_TOKENS,
) -> Path:
    """Write a model of random weights, large enough that its probabilities are not all alike."""
    model = ReverseGPT(shape, codec.vocab_size)
    model.initialize(1)
    with torch.no_grad():
        model.lm_head.weight *= 20
    folder.mkdir(parents=True)
    weights = dict(model.named_parameters())
    write_model_folder(
        folder,
        ModelDescription(
            shape=shape,
            vocab_size=codec.vocab_size,
            context_tokens=context_tokens,
            text_format=codec.format,
            step=1,
            val_loss=None,
        ),
        {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()},
        lambda name: weights[name].detach(),
        codec.model_bytes,
        1 << 30,
    )
    return folder


def tiny_models(folder: Path, codec: Any, num_slots: int = 8) -> dict[str, ServedModel]:
    """Two models: `tiny`, backward, and `ahead`, forward."""
    backward = write_tiny_model(folder / "tiny", codec(Direction.BACKWARD, Unit.TOKEN))
    forward = write_tiny_model(folder / "ahead", codec(Direction.FORWARD, Unit.TOKEN))
    return load_models(backward, forward, torch.device("cpu"), torch.float32, num_slots)


def endless_prompt(model: ServedModel) -> str:
    """A prompt whose greedy sample does not end soon."""
    for number in range(100):
        prompt = model.codec.prompt(f"{number} maps.")
        options = SamplingOptions(1000, temperature=0)
        new_ids = generate(model.decoder, model.codec, prompt, CONTEXT_TOKENS, options)
        if sum(1 for _ in new_ids) == 1000:
            return f"{number} maps."
    raise AssertionError


@dataclass
class Running:
    """A running server and its address."""

    url: str
    service: Service
    server: uvicorn.Server

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)


@contextmanager
def serving(
    models: dict[str, ServedModel],
    limits: Limits | None = None,
    *,
    token: str | None = None,
    allowed: tuple[Address, ...] = (),
    infiller: Infiller | None = None,
    shutdown_s: float = 5,
) -> Iterator[Running]:
    """Run a server until the block ends."""
    limits = limits or Limits()
    metrics = Metrics()
    batches = {name: model.batch for name, model in models.items()}
    engine = Engine(batches, limits.waiting_samples, metrics)
    service = Service(
        models=models, engine=engine, limits=limits, metrics=metrics, infiller=infiller
    )
    server = Server(service, shutdown_s, token=token, allowed=allowed, log_level="error")
    listener = listening_socket("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def metric(running: Running, name: str, model: str | None = None) -> float:
    """A value of /metrics."""
    label = f'{{model="{model}"}}' if model else ""
    found = re.search(
        rf"^megaback_{name}{re.escape(label)} (\S+)$", running.get("/metrics").text, re.MULTILINE
    )
    assert found, name
    return float(found.group(1))


def wait_until(is_so: Callable[[], bool], max_s: float = 20) -> None:
    """Poll until the condition holds."""
    ends_s = time.monotonic() + max_s
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.05)


@contextmanager
def raw(running: Running, sent: bytes) -> Iterator[socket.socket]:
    """A connection whose client has sent `sent`, and reads slowly."""
    port = int(running.url.rsplit(":", 1)[1])
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        connection.sendall(sent)
        yield connection


def posted(body: dict[str, Any], path: str = "/v1/completions", headers: str = "") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n{headers}"
    return head.encode() + b"\r\n" + content


@contextmanager
def started(*arguments: object, **variables: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The process of a server, and its URL."""
    command = [sys.executable, "-m", "megaback", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://" in line, process.stderr and process.stderr.read()
            url = next(word for word in line.split() if word.startswith("http"))
            yield process, url.replace("0.0.0.0", "127.0.0.1")
        finally:
            process.kill()


def num_running(url: str) -> float:
    """Number of running samples."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith("megaback_samples_running{")
    )
