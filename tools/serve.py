"""`megaback serve`: OpenAI's completions API, and a web page."""

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.file_limits import raise_file_limit
from data_pipeline.common.loopback import is_loopback
from data_pipeline.common.number_ranges import (
    BODY_BYTES,
    COUNT,
    PORT,
    SECONDS,
    SHUTDOWN_SECONDS,
    SLOTS,
)
from data_pipeline.errors import BackendError, ServeError
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    dtype_option,
    max_new_tokens_option,
)

if TYPE_CHECKING:
    from megaback.inference.infill.infiller import Infiller
    from tools.serving.host_names import Address
    from tools.serving.models import ServedModel
    from tools.serving.request_limits import Limits

TOKEN_VARIABLE = "MEGABACK_SERVE_TOKEN"  # noqa: S105 - a variable's name, not a token
_MIN_TOKEN_CHARACTERS = 16


def read_token(path: Path | None) -> str | None:
    """The token in a file or, by default, in the environment.

    Raises ServeError for one that is too short, or invalid in a header.
    """
    if path is not None:
        where, token = str(path), path.read_text(encoding="utf-8", errors="replace").strip()
    elif TOKEN_VARIABLE in os.environ:
        where, token = TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE].strip()
    else:
        return None
    is_plain = token.isascii() and token.isprintable() and " " not in token
    if len(token) < _MIN_TOKEN_CHARACTERS or not is_plain:
        raise ServeError(
            f"the token in {where} is not {_MIN_TOKEN_CHARACTERS} or more visible ASCII "
            "characters without spaces; write one with `openssl rand -hex 32`"
        )
    return token


def listening_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError if the address is unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another --port or --host"
        ) from None


def run_server(
    models: "dict[str, ServedModel]",
    listener: socket.socket,
    limits: "Limits",
    token: str | None,
    shutdown_s: float,
    infiller: "Infiller | None" = None,
    allowed: "tuple[Address, ...]" = (),
) -> None:
    """Serve until SIGTERM or SIGINT; then finish open requests, for at most `shutdown_s`.

    Raises KeyboardInterrupt after SIGINT.
    """
    from tools.serving.context import Service
    from tools.serving.process import Server
    from tools.serving.prometheus import Metrics
    from tools.serving.worker import Engine

    host, port = listener.getsockname()[:2]
    metrics = Metrics()
    batches = {name: model.batch for name, model in models.items()}
    engine = Engine(batches, limits.waiting_samples, metrics)
    service = Service(
        models=models, engine=engine, limits=limits, metrics=metrics, infiller=infiller
    )
    server = Server(service, shutdown_s, token=token, allowed=allowed)
    # uvicorn re-raises a signal after shutdown; these handlers keep it from ending the process.
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"{', '.join(models)}: http://{shown}:{port} (Ctrl-C ends)")
    server.run(sockets=[listener])
    if signal.SIGINT in received:
        raise KeyboardInterrupt


@click.command(
    cls=WorkCommand,
    name="serve",
    epilog=examples(
        "megaback serve models/xcoax",
        "megaback serve models/backchat --forward models/answers --device cuda:0",
        "megaback serve models/xcoax --host 0.0.0.0 --token-file token.txt",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--forward",
    type=click.Path(path_type=Path),
    help="Folder of a forward model to serve beside the first.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=PORT.option, default=8000, show_default=True, help="TCP port to listen on."
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"File with the token that clients must send; or set {TOKEN_VARIABLE}. Required on "
    "any address but loopback.",
)
@click.option(
    "--allow-host",
    "allow_hosts",
    metavar="NAME[:PORT]",
    multiple=True,
    help="Additional Host header to accept, that of a reverse proxy in front of a loopback "
    "address. May be repeated.",
)
@click.option(
    "--slots",
    type=SLOTS.option,
    default=16,
    show_default=True,
    help="Number of samples that each model generates concurrently.",
)
@max_new_tokens_option(4096, "sample")
@click.option(
    "--max-requests",
    type=COUNT.option,
    default=256,
    show_default=True,
    help="Maximum number of concurrent requests, active or queued.",
)
@click.option(
    "--max-body-bytes",
    type=BODY_BYTES.option,
    default=1 << 20,
    show_default=True,
    help="Maximum size of a request's body, in bytes.",
)
@click.option(
    "--max-seconds",
    type=SECONDS.option,
    default=300.0,
    show_default=True,
    help="Maximum time per request, in seconds; the answer is truncated there.",
)
@click.option(
    "--shutdown-seconds",
    type=SHUTDOWN_SECONDS.option,
    default=30.0,
    show_default=True,
    help="Time to finish requests after a SIGTERM, in seconds; then they are aborted.",
)
@device_option
@dtype_option
@cuda_graphs_option
def main(
    folder: Path,
    forward: Path | None,
    host: str,
    port: int,
    token_file: Path | None,
    allow_hosts: tuple[str, ...],
    slots: int,
    max_new_tokens: int,
    max_requests: int,
    max_body_bytes: int,
    max_seconds: float,
    shutdown_seconds: float,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
) -> None:
    """Serve the model in DIR through OpenAI's API, and as a web page.

    DIR is a converted model, a run or a checkpoint.
    """
    from tools.serving.host_names import read_allowed

    token, allowed = read_token(token_file), read_allowed(allow_hosts)
    if token is None and not is_loopback(host):
        raise ServeError(
            f"--host {host} can be reached from other machines, so clients need a token: give it "
            f"in --token-file or {TOKEN_VARIABLE}, or use --host 127.0.0.1"
        )
    try:
        import fastapi  # noqa: F401 - checked before loading a model
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"serving needs the package {error.name}; install it with `pip install "
            "'megaback[serve]'`"
        ) from None
    raise_file_limit()
    with listening_socket(host, port) as listener:
        from megaback.inference.placement import choose_device, choose_dtype
        from megaback.weights.converted import model_folder
        from tools.serving.models import load_meeting, load_models
        from tools.serving.request_limits import Limits

        on = choose_device(device)
        folder = model_folder(folder)
        forward = None if forward is None else model_folder(forward)
        models = load_models(folder, forward, on, choose_dtype(dtype, on), slots, cuda_graphs)
        limits = Limits(
            body_bytes=max_body_bytes,
            open_requests=max_requests,
            waiting_samples=max_requests * 4,
            tokens=max_new_tokens,
            request_s=max_seconds,
        )
        infiller = load_meeting(models)
        run_server(models, listener, limits, token, shutdown_seconds, infiller, allowed)


if __name__ == "__main__":
    main()
