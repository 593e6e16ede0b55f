"""Activation memory: that which PyTorch saves, and the peak of a backward pass."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaback.config import ModelSection
from megaback.config_finetune import LoraSection, TargetModule
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import add_adapters
from megaback.planning.activation_memory import Arithmetic, activations_of

VOCAB_SIZE, TOKENS = 101, 64
CPU = torch.device("cpu")


def saved_bytes(
    shape: ModelSection,
    arithmetic: Arithmetic,
    checkpointing: str,
    z_loss: float,
    lora: LoraSection | None = None,
) -> float:
    """Bytes per token of all tensors that PyTorch saves, except those of the weights' sizes."""
    model = ReverseGPT(
        shape, VOCAB_SIZE, activation_checkpointing=checkpointing, z_loss=z_loss
    ).train()
    if lora is not None:
        add_adapters(model, lora)
    if arithmetic == "bf16":
        model.bfloat16()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other tensor reuses its address
        return tensor

    ids_T = torch.randint(0, VOCAB_SIZE, (TOKENS,))
    segments = Segments.from_lengths((TOKENS // 2, TOKENS // 2), CPU)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"),
    ):
        model(ids_T, ids_T, torch.arange(TOKENS), segments)
    copies = 0 if lora else 4 * model.lm_head.weight.numel()  # the sum of its gradients
    if arithmetic == "autocast" and checkpointing != "block":
        copies += 2 * sum(
            w.numel() for n, w in model.named_parameters() if "layers" in n and w.ndim > 1
        )
    return (sum(found.values()) - copies) / TOKENS


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 2, "head_dim": 32}, {"qk_norm": False}],
    ids=["mha", "wide heads", "llama"],
)
def test_the_estimate_is_exact_for_blocks_and_within_a_few_bytes_for_the_rest(
    changes: dict[str, object], checkpointing: str, arithmetic: Arithmetic
) -> None:
    def of_layers(num_layers: int, z_loss: float = 0.0) -> tuple[float, ModelSection]:
        fields = {"num_layers": num_layers, "width": 64, "num_heads": 4, **changes}
        shape = ModelSection.model_validate(fields).resolved()
        return saved_bytes(shape, arithmetic, checkpointing, z_loss), shape

    (one, shape), (three, _), (penalized, _) = of_layers(1), of_layers(3), of_layers(1, 1e-4)

    kept = activations_of(shape, arithmetic, checkpointing, "sdpa")

    assert (three - one) / 2 == kept.block
    # Recomputed functions hold the cosines without saving them.
    rotary = 0 if checkpointing == "none" else 8 * shape.head_size
    assert one - kept.block + rotary == pytest.approx(kept.rest, abs=16)
    assert penalized == one


@pytest.mark.parametrize(
    ("arithmetic", "is_stage_3"),
    [("fp32", False), ("bf16", False), ("autocast", False), ("fp32", True), ("bf16", True)],
)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("all-linear",)])
def test_less_is_saved_for_frozen_weights(
    is_stage_3: bool,
    targets: tuple[TargetModule, ...],
    checkpointing: str,
    arithmetic: Arithmetic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_stage_3:
        from deepspeed.runtime.zero.linear import zero3_linear_wrap

        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    fields = {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2}
    lora = LoraSection(rank=8, target_modules=targets)
    two, four = (
        ModelSection.model_validate({**fields, "num_layers": layers}).resolved()
        for layers in (2, 4)
    )
    saved = [saved_bytes(shape, arithmetic, checkpointing, 0.0, lora) for shape in (two, four)]

    kept = activations_of(
        two, arithmetic, checkpointing, "sdpa", lora=lora, saves_inputs=is_stage_3
    )

    assert (saved[1] - saved[0]) / 2 == pytest.approx(kept.block, rel=0.02)
    # The first block has no gradients before its first adapter.
    assert saved[0] <= 2 * kept.block + kept.rest + 16


class LivePeak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak of the bytes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, int] = {}
        self._total = self.peak = 0

    def __torch_dispatch__(
        self, operator: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self._total += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self._total)
        return results

    def _free(self, key: int) -> None:
        self._total -= self._live.pop(key)


def peak_bytes(
    shape: ModelSection,
    arithmetic: Arithmetic,
    checkpointing: str,
    tokens: int,
    lora: LoraSection | None = None,
) -> float:
    """Peak of a backward pass on one row."""
    model = ReverseGPT(shape, 8, activation_checkpointing=checkpointing, loss_chunk_tokens=8)
    model.train()
    if lora is not None:
        add_adapters(model, lora)
    if arithmetic == "bf16":
        model.bfloat16()
    live, segments = LivePeak(), Segments.from_lengths((tokens,), CPU)
    with live:
        ids_T, targets_T = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
            loss = model(ids_T, targets_T, torch.arange(tokens), segments).sum()
        live.peak = 0
        loss.backward()
    return live.peak


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize(
    ("mlp_width", "head_dim"),
    [(128, 16), (256, 16), (192, 32)],
    ids=["narrow", "wide", "wide heads"],
)
def test_the_peak_of_a_backward_pass_is_that_of_the_estimate(
    mlp_width: int, head_dim: int, checkpointing: str, arithmetic: Arithmetic
) -> None:
    fields = {"num_layers": 1, "width": 64, "num_heads": 4}
    fields |= {"mlp_width": mlp_width, "head_dim": head_dim}
    shape = ModelSection.model_validate(fields).resolved()
    kept = activations_of(shape, arithmetic, checkpointing, "sdpa")

    short, long = (peak_bytes(shape, arithmetic, checkpointing, tokens) for tokens in (256, 512))

    found = (long - short) / 256
    assert kept.block + max(kept.norm_work, kept.block_work) == pytest.approx(found, abs=16)


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)])
def test_the_peak_with_frozen_weights_is_at_most_that_of_the_estimate(
    targets: tuple[TargetModule, ...], checkpointing: str, arithmetic: Arithmetic
) -> None:
    fields = {"num_layers": 3, "width": 64, "num_heads": 4, "mlp_width": 192}
    shape = ModelSection.model_validate(fields).resolved()
    lora = LoraSection(rank=8, target_modules=targets)
    kept = activations_of(shape, arithmetic, checkpointing, "sdpa", lora=lora)

    short, long = (
        peak_bytes(shape, arithmetic, checkpointing, tokens, lora) for tokens in (256, 512)
    )

    planned = 3 * kept.block + max(kept.norm_work, kept.block_work)
    assert 0.9 * planned < (long - short) / 256 <= planned + 16
