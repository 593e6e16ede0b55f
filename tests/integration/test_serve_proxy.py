"""A server on loopback behind nginx with TLS, as in docs/serve.md."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from data_pipeline.text.codec import TextCodec
from tests.helpers.paths import ROOT
from tests.helpers.server import num_running, started, wait_until, write_tiny_model

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
pytestmark = pytest.mark.skipif(
    NGINX is None or shutil.which("openssl") is None,
    reason="needs nginx and openssl: apt-get install nginx-light openssl",
)

NAME = "demo.example.org"
DOCS = ROOT / "docs" / "serve.md"
# The main part of a distribution's nginx.conf.
AROUND = """
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


@dataclass
class Proxied:
    """A server as seen by its proxy's clients."""

    client: httpx.Client
    direct: str
    """Address of the server itself."""
    url: str = f"https://{NAME}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def documented(port: int, upstream: str, folder: Path) -> str:
    """The nginx server block of docs/serve.md with this test's paths."""
    (server,) = re.findall(r"```nginx\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for before, after in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("http://127.0.0.1:8000", upstream),
        ("/etc/ssl/demo.pem", f"{folder}/demo.pem"),
        ("/etc/ssl/demo.key", f"{folder}/demo.key"),
    ):
        assert server.count(before) == 1, before
        server = server.replace(before, after)
    assert f"--allow-host {NAME}\n" in DOCS.read_text()
    return str(server)


@contextmanager
def proxying(upstream: str, folder: Path) -> Iterator[Proxied]:
    """nginx in front of a server, and a client that resolves its name to this machine."""
    folder.mkdir()
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    make += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    make += ["-keyout", folder / "demo.key", "-out", folder / "demo.pem"]
    subprocess.run(make, check=True, capture_output=True)
    port = free_port()
    config = folder / "nginx.conf"
    server = documented(port, upstream, folder)
    config.write_text(AROUND.format(folder=folder, server=server))
    assert NGINX is not None
    command = [NGINX, "-c", config, "-p", folder, "-g", "daemon off; master_process off;"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as nginx:
        try:
            wait_until(lambda: nginx.poll() is not None or is_open(port))
            assert nginx.poll() is None, nginx.stderr and nginx.stderr.read()
            context = ssl.create_default_context(cafile=str(folder / "demo.pem"))
            transport = ToHere(port, context)
            with httpx.Client(transport=transport, timeout=60) as client:
                yield Proxied(client, upstream)
        finally:
            nginx.terminate()
    log = (folder / "error.log").read_text()
    assert not [line for line in log.splitlines() if "[emerg]" in line or "[crit]" in line]


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


class ToHere(httpx.HTTPTransport):
    """Transport that connects to this machine for any host name; TLS checks the name."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(verify=context)
        self._port = port

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": request.url.host}
        request.headers["host"] = request.url.host
        request.url = request.url.copy_with(host="127.0.0.1", port=self._port)
        return super().handle_request(request)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", codec())


@pytest.fixture(scope="module")
def proxied(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    limits = ["--max-requests", 1, "--slots", 2]
    with (
        started(folder, "--allow-host", NAME, *limits) as (process, url),
        proxying(url, tmp_path_factory.mktemp("nginx") / "nginx") as found,
    ):
        yield found
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")


def test_openais_client_writes_and_streams_through_tls(proxied: Proxied) -> None:
    client = openai.OpenAI(
        base_url=f"{proxied.url}/v1", api_key="none", max_retries=0, http_client=proxied.client
    )
    asked: dict[str, Any] = {"model": "tiny", "prompt": "it.", "max_tokens": 30, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True, extra_body={"stream_order": "writing"})
    assert "".join(reversed([chunk.choices[0].text for chunk in stream])) == whole != ""


def test_the_page_is_served_and_its_requests_are_accepted(proxied: Proxied) -> None:
    page = proxied.client.get(proxied.url)
    assert (page.status_code, "<html" in page.text) == (200, True)
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    ours, another = (
        proxied.client.get(f"{proxied.url}/v1/models", headers={"origin": origin})
        for origin in (f"https://{NAME}", "https://evil.example")
    )
    assert (ours.status_code, another.status_code) == (200, 403)


def test_a_stream_is_not_buffered_others_get_503_and_a_disconnect_is_noticed(
    proxied: Proxied,
) -> None:
    body = {"prompt": "it.", "max_tokens": 4096, "ignore_eos": True, "stream": True}
    body["stream_order"] = "writing"
    url = f"{proxied.url}/v1/completions"
    with proxied.client.stream("POST", url, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()  # a collected response would close the connection
        assert next(lines).startswith("data: ")
        # Not one of 4096 tokens has to wait for another.
        assert num_running(proxied.direct) == 1
        busy = proxied.client.post(url, json={"prompt": "it."})
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
        assert busy.json()["error"]["message"].startswith("1 requests are open already")
    wait_until(lambda: num_running(proxied.direct) == 0)
    whole = {**body, "stream": False}
    with pytest.raises(httpx.ReadTimeout):
        proxied.client.post(url, json=whole, timeout=1)
    wait_until(lambda: num_running(proxied.direct) == 0)


def test_a_large_body_is_refused_by_the_proxy(proxied: Proxied) -> None:
    answer = proxied.client.post(f"{proxied.url}/v1/score", json={"texts": ["a" * 1_200_000]})
    assert answer.status_code == 413


def test_requests_forwarded_under_other_names_are_refused(proxied: Proxied) -> None:
    claims = {"x-forwarded-host": NAME, "x-forwarded-for": "127.0.0.1", "forwarded": f"host={NAME}"}
    answer = httpx.get(f"{proxied.direct}/v1/models", headers={**claims, "host": "evil.example"})
    assert answer.status_code == 403
    denied = {"x-forwarded-host": "evil.example", "x-real-ip": "192.0.2.1"}
    assert proxied.client.get(f"{proxied.url}/v1/models", headers=denied).status_code == 200


def test_without_the_allowed_host_the_error_names_the_option(folder: Path, tmp_path: Path) -> None:
    with started(folder) as (_, url), proxying(url, tmp_path / "nginx") as proxied:
        answer = proxied.client.get(f"{proxied.url}/v1/models")
        assert answer.status_code == 403
        assert f"start the server with --allow-host {NAME}" in answer.json()["error"]["message"]
