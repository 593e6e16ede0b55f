"""Peak memory of converting a checkpoint to safetensors: ours and DeepSpeed's `zero_to_fp32`.

    python benchmarks/convert.py [--width 1024] [--layers 8]

One engine at ZeRO 2 saves both checkpoints of the same weights and moments. Each conversion runs in
its own process. Reported are its peak resident memory minus that after imports, and its seconds.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import click
from smoke import Benchmark

from launcher.ranks.local import rank_environment

_MEASURE = """
import resource, sys, time
from pathlib import Path
source, out = sys.argv[1:]
{imports}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, started = peak(), time.perf_counter()
{work}
print((peak() - before) / 1e6, time.perf_counter() - started)
"""
_WAYS = {
    "ours, float32": (
        "import tools.export.gguf, tools.export.hf, megaback.weights.source\n"
        "from tools.convert import convert",
        "convert(Path(source) / 'ours', Path(out), 'hf', 'float32')",
    ),
    "ours, bfloat16": (
        "import tools.export.gguf, tools.export.hf, megaback.weights.source\n"
        "from tools.convert import convert",
        "convert(Path(source) / 'ours', Path(out), 'hf', 'bfloat16')",
    ),
    "zero_to_fp32": (
        "from deepspeed.utils import zero_to_fp32",
        "zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict("
        "source + '/theirs', out, safe_serialization=True)",
    ),
    "zero_to_fp32, lazy_mode": (
        "from deepspeed.utils import zero_to_fp32\nfrom safetensors.torch import save_file",
        "state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(\n"
        "    source + '/theirs', lazy_mode=True)\n"
        "for name, tensor in state.items():\n"
        "    save_file({'weight': tensor.contiguous()}, out + '-' + name)",
    ),
}


def save_both(width: int, layers: int, folder: Path, tokenizer: Path) -> None:
    """An engine in the state after a first step, saved by us and by DeepSpeed."""
    os.environ |= rank_environment(1)
    import torch

    from data_pipeline.text.codec import Direction, TextCodec, Unit
    from megaback.checkpoints.checkpoint import CheckpointMeta
    from megaback.checkpoints.saver import CheckpointSaver
    from megaback.checkpoints.state import named_state
    from megaback.config import Config
    from megaback.config_operation import CheckpointSection
    from megaback.distributed.engine import start_engine
    from megaback.distributed.world import end_rank, start_world
    from megaback.model.gpt import ReverseGPT

    config = Config.model_validate(
        {
            "run": folder / "ours",
            "data": {"shards": "unused"},
            "model": {"num_layers": layers, "width": width, "num_heads": 8},
            "batch": {"context_tokens": 64, "global_batch_rows": 1, "micro_batch_rows": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "precision": "fp32"},
            "zero": {"stage": 2},
        }
    )
    codec = TextCodec.load(tokenizer, Direction.BACKWARD, Unit.TOKEN)
    world = start_world("cpu", 600)
    model = ReverseGPT(config.model, codec.vocab_size)
    model.initialize(0)
    engine = start_engine(model, config, 1, 1)
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        zeros = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
        engine.basic_optimizer.state[flat] = {"step": torch.tensor(1.0), **zeros}
    saver = CheckpointSaver(config.run, codec.model_bytes, CheckpointSection(), world)
    meta = CheckpointMeta(
        step=1,
        updates=1,
        world_size=1,
        zero_stage=2,
        precision="fp32",
        vocab_size=codec.vocab_size,
        text_format=codec.format.to_dict(),
        data_fingerprint="",
        config=config.model_dump(mode="json"),
        val_loss=None,
        versions={},
        files={},
    )
    saver.begin(named_state(engine, 0, 1), meta)
    saver.finish()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        engine.save_checkpoint(str(folder / "theirs"), tag="step")
    sizes = [4 * weight.numel() for weight in model.parameters()]
    print(
        f"weights {sum(sizes) / 1e6:.0f} MB, largest tensor {max(sizes) / 1e6:.0f} MB", flush=True
    )
    end_rank()


@click.command(cls=Benchmark, smoke="--width 32 --layers 1 --tokenizer {tokenizer}")
@click.option("--width", default=1024, show_default=True, help="Model width.")
@click.option("--layers", default=8, show_default=True, help="Number of layers.")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="SentencePiece model file.",
)
@click.option("--only-save", hidden=True, type=click.Path(path_type=Path))
def main(width: int, layers: int, tokenizer: Path, only_save: Path | None) -> None:
    """Print a line per conversion."""
    if only_save is not None:
        save_both(width, layers, only_save, tokenizer)
        return
    with tempfile.TemporaryDirectory() as name:
        command = [sys.executable, __file__, f"--width={width}", f"--layers={layers}"]
        command += [f"--tokenizer={tokenizer}", f"--only-save={name}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        for number, (way, (imports, work)) in enumerate(_WAYS.items()):
            program = _MEASURE.format(imports=imports, work=work)
            result = subprocess.run(
                [sys.executable, "-c", program, name, f"{name}/out-{number}"],
                check=True,
                capture_output=True,
                text=True,
            )
            megabytes, seconds = map(float, result.stdout.split()[-2:])
            print(f"{way:24} {megabytes:7.0f} MB {seconds:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
