"""Serving many concurrent clients relative to one after another, with the same texts.

    python benchmarks/serve.py [--clients 50] [--max-new-tokens 100] [--slots 16] [--threads 2]

A model of random weights behind a real server in its own process; greedy, 50 different endings.
Each text is compared with the output of `generate` for its ending alone. Wall time.
"""

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import httpx
import psutil
import torch
from smoke import Benchmark, write_random_model

from data_pipeline.text.codec import Direction
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from megaback.inference.decoder import load_decoder
from megaback.inference.generate import complete
from megaback.inference.sampling import SamplingOptions
from tools.serve import listening_socket, run_server
from tools.serving.models import load_models
from tools.serving.request_limits import Limits

CONTEXT_TOKENS = 512


def write_model(folder: Path, tokenizer: Path | None, layers: int, width: int) -> None:
    """A model of random weights, with a new tokenizer if none is given."""
    if tokenizer is None:
        train_tokenizer("pydocs", folder.parent / "tokenizer", 2048, 5_000_000)
        tokenizer = folder.parent / "tokenizer" / TOKENIZER_NAME
    write_random_model(folder, tokenizer, Direction.BACKWARD, layers, width, CONTEXT_TOKENS)


def serve(folder: Path, port: int, slots: int, threads: int) -> None:
    torch.set_num_threads(threads)
    models = load_models(folder, None, torch.device("cpu"), torch.float32, slots)
    run_server(models, listening_socket("127.0.0.1", port), Limits(), None, 10)


async def ask_all(
    url: str, endings: Sequence[str], tokens: int, at_once: int
) -> tuple[list[str], int]:
    """The texts, and their number of tokens."""
    gate = asyncio.Semaphore(at_once)
    limits = httpx.Limits(max_connections=at_once)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def ask(ending: str) -> tuple[str, int]:
            body = {"prompt": ending, "max_tokens": tokens, "temperature": 0, "echo": True}
            async with gate:
                answer = (await client.post(f"{url}/v1/completions", json=body)).json()
            return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

        found = await asyncio.gather(*map(ask, endings))
    return [text for text, _ in found], sum(count for _, count in found)


@click.command(
    cls=Benchmark,
    smoke="--clients 3 --max-new-tokens 4 --slots 2 --layers 1 --width 64 --threads 1"
    " --tokenizer {tokenizer}",
)
@click.option("--clients", default=50, show_default=True, help="Concurrent clients.")
@click.option("--max-new-tokens", default=100, show_default=True, help="New tokens per sample.")
@click.option(
    "--slots",
    default=16,
    show_default=True,
    help="Samples that the server writes at the same time.",
)
@click.option("--threads", default=2, show_default=True, help="Threads of the server's model.")
@click.option("--layers", default=6, show_default=True, help="Number of layers.")
@click.option("--width", default=384, show_default=True, help="Model width.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Default: one is trained.")
def main(
    clients: int,
    max_new_tokens: int,
    slots: int,
    threads: int,
    layers: int,
    width: int,
    tokenizer: Path | None,
) -> None:
    """Print both speeds and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_model(folder, tokenizer, layers, width)
        with listening_socket("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        start = multiprocessing.get_context("spawn").Process
        server = start(target=serve, args=(folder, port, slots, threads))
        server.start()
        while True:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        endings = [f"and the value of number {number} is returned." for number in range(clients)]
        asyncio.run(ask_all(url, endings[:2], 3, 2))
        memory = psutil.Process(server.pid).memory_info
        before = memory().rss
        speeds, texts = {}, {}
        for at_once in (1, clients):
            started_s = time.monotonic()
            texts[at_once], written = asyncio.run(ask_all(url, endings, max_new_tokens, at_once))
            speeds[at_once] = written / (time.monotonic() - started_s)
            print(f"{at_once:3} at once: {written} tokens, {speeds[at_once]:.0f} tokens/s")
        grown = (memory().rss - before) / 1e6
        server.terminate()
        server.join()
        decoder, _, codec = load_decoder(folder, torch.device("cpu"), torch.float32)
        options = SamplingOptions(max_new_tokens, temperature=0)
        alone = [complete(decoder, codec, ending, CONTEXT_TOKENS, options) for ending in endings]
        alone = [text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for text in alone]
        same = [texts[at_once] == alone for at_once in (1, clients)]
        print(f"ratio {speeds[clients] / speeds[1]:.2f}, texts as alone: {same}")
        print(f"memory grew by {grown:.0f} MB, exit code {server.exitcode}")


if __name__ == "__main__":
    main()
