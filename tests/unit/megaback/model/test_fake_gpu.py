"""Forward and backward pass on a fake GPU: no mixed devices, and the host never waits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from tests.helpers.device_traffic import Traffic
from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.small_models import CPU, make_model, random_ids

LENGTHS = (7, 1, 12)
KINDS = ("none", "selective", "block")


def batch_on(device: torch.device, lengths: tuple[int, ...] = LENGTHS) -> tuple[Any, ...]:
    """Arguments of the forward pass: packed documents."""
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    ids_T, targets_T = (random_ids(sum(lengths), seed) for seed in (0, 1))
    on_device = [one.to(device) for one in (ids_T, targets_T, positions_T)]
    return *on_device, Segments.from_lengths(lengths, device)


def trained(model: ReverseGPT, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """The loss and the gradients of a pass."""
    loss = model.train()(*batch).sum()
    loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return {"loss": loss.detach(), **gradients}


def traffic_of(model: ReverseGPT, lengths: tuple[int, ...]) -> Traffic:
    batch = batch_on(gpu(), lengths)
    with counted() as traffic:
        trained(model, batch)
    return traffic


@on_fake_gpu
def test_gradients_are_those_of_the_cpu_without_a_wait() -> None:
    for kind in KINDS:
        on_cpu, on_gpu = make_model(), moved(make_model())
        for model in (on_cpu, on_gpu):
            model.z_loss = 0.1
            model.checkpoint_activations(kind)
        expected, batch = trained(on_cpu, batch_on(CPU)), batch_on(gpu())

        with counted() as traffic:
            found = trained(on_gpu, batch)

        assert traffic.syncs == traffic.to_host == [], traffic
        # The two tensors of sdpa's groups, in pinned memory: the host does not wait.
        assert len([line for line in traffic.to_device if " in sent," in line]) == 2, traffic
        assert len(traffic.to_device) == 2, traffic
        for name, value in found.items():
            assert value.device == gpu()
            largest = float(expected[name].abs().max())
            torch.testing.assert_close(
                value.cpu(), expected[name], rtol=0.0, atol=3e-6 * largest, msg=f"{name}, {kind}"
            )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 155), (torch.bfloat16, 190)])
@on_fake_gpu
def test_the_kernels_of_a_layer_are_bounded(dtype: torch.dtype, bound: int) -> None:
    """With one document. The backward passes of fused kernels are counted in their parts."""
    one, three = (moved(make_model(num_layers=count).to(dtype)) for count in (1, 3))

    of_one, of_three = traffic_of(one, (20,)), traffic_of(three, (20,))

    assert (of_three.num_kernels - of_one.num_kernels) / 2 <= bound, of_three


@on_fake_gpu
def test_a_batch_on_the_host_is_an_error() -> None:
    model = moved(make_model())
    ids_T, targets_T, positions_T, segments = batch_on(gpu())

    with pytest.raises(RuntimeError, match="same device"):
        model(ids_T.cpu(), targets_T, positions_T, segments)
    with pytest.raises(RuntimeError, match="same device"):
        model(ids_T, targets_T, positions_T.cpu(), segments)
    with pytest.raises(RuntimeError, match="same device"):
        model(ids_T, targets_T.cpu(), positions_T, segments)


@on_fake_gpu
def test_initialized_weights_are_those_of_the_cpu() -> None:
    on_cpu, on_gpu = make_model(), moved(make_model(seed=2))

    on_gpu.initialize(1)

    first = on_gpu.model.layers[0].mlp.down_proj.weight
    assert first.device == gpu()
    assert torch.equal(6 * first.detach().cpu(), on_cpu.model.layers[0].mlp.down_proj.weight)
