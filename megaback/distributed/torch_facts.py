"""Versions and devices of torch and DeepSpeed, and backends of attention, as JSON.

`python -m megaback.distributed.torch_facts` is a separate process, for commands that must not load
torch, and because a broken installation may crash it. Modules that cannot be imported are listed
with the reason.
"""

import importlib
import json
from types import ModuleType
from typing import Any

_USUAL_HEAD_DIM = 64


def torch_facts() -> dict[str, Any]:
    """Versions, devices and communication backends, and `problems` with failed imports."""
    problems: dict[str, str] = {}
    facts: dict[str, Any] = {"problems": problems, "devices": []}
    torch = _imported("torch", problems)
    if torch is None:
        return facts
    facts["torch"] = torch.__version__
    facts["cuda_build"] = torch.version.cuda
    if torch.cuda.is_available():
        facts["devices"] = [_device(torch, number) for number in range(torch.cuda.device_count())]
    for name in ("gloo", "nccl"):
        is_there = torch.distributed.is_available()
        facts[name] = is_there and getattr(torch.distributed, f"is_{name}_available")()
    deepspeed = _imported("deepspeed", problems)
    facts["deepspeed"] = None if deepspeed is None else deepspeed.__version__
    try:
        facts["attention"] = _attention(torch)
    except Exception as error:  # noqa: BLE001 (kernels and drivers may raise anything)
        problems["attention"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return facts


def _attention(torch: ModuleType) -> dict[str, Any]:
    """The backend that `auto` chooses in bf16, and for each kernel the reason why it is unusable.

    `install`: command for a faster one than sdpa.
    """
    from megaback.model.attention_choice import why_unusable
    from megaback.model.flash_attention import KERNELS, VARLEN

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = {
        kernel.name: why_unusable(kernel, device, torch.bfloat16, _USUAL_HEAD_DIM)
        for kernel in KERNELS
    }
    usable = [name for name, reason in reasons.items() if reason is None]
    return {"auto": [*usable, "sdpa"][0], "kernels": reasons, "install": VARLEN.install}


def _device(torch: ModuleType, number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _imported(name: str, problems: dict[str, str]) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 (a broken installation may raise anything)
        problems[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


if __name__ == "__main__":
    print(json.dumps(torch_facts()))
