"""Activation memory of a forward pass, compared with the tensors that PyTorch saves."""

import pytest
import torch
from torch import Tensor

from megaback.config import ModelSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.planning.activation_memory import Arithmetic, activations_of

VOCAB_SIZE, TOKENS = 101, 64
CPU = torch.device("cpu")


def saved_bytes(
    shape: ModelSection, arithmetic: Arithmetic, checkpointing: str, z_loss: float
) -> float:
    """Bytes per token of all tensors that PyTorch saves, except those of the weights' sizes."""
    model = ReverseGPT(
        shape, VOCAB_SIZE, activation_checkpointing=checkpointing, z_loss=z_loss
    ).train()
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
    copies = 4 * model.lm_head.weight.numel()  # the sum of its gradients
    if arithmetic == "autocast" and checkpointing != "block":
        copies += 2 * sum(
            w.numel() for n, w in model.named_parameters() if "layers" in n and w.ndim > 1
        )
    return (sum(found.values()) - copies) / TOKENS


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2}, {"qk_norm": False}], ids=["mha", "gqa", "llama"]
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
    rotary = 0 if checkpointing == "none" else 8 * shape.head_dim
    assert one - kept.block + rotary == pytest.approx(kept.rest, abs=16)
    assert penalized == one
