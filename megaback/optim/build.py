"""AdamW and Muon as one optimizer that ZeRO can shard.

DeepSpeed passes flat slices of fp32 weights with clipped gradients. AdamW updates any slice. Muon
needs whole matrices, which `zero_matrices` gathers after clipping, so that the logged and clipped
norm is the gradient's. (DeepSpeed's own Muon orthogonalizes gradients before clipping, and clips
the result.)
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megaback.config import ModelSection, OptimizerSection
from megaback.model.mup import parameter_rule
from megaback.optim.muon import orthogonalized
from megaback.optim.zero_matrices import MatrixShards, slices_of_each, slices_of_flat


class MatrixOptimizer(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, 2019); Muon in groups with `orthogonalize`."""

    # PyTorch hides these from its compiler, and loads the compiler for it at the first call.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    _step_adamw = inspect.unwrap(torch.optim.AdamW.step)

    def __init__(
        self, groups: list[dict[str, Any]], section: OptimizerSection, matrix_dtype: torch.dtype
    ) -> None:
        """`matrix_dtype`: precision in which matrices are orthogonalized."""
        super().__init__(
            groups,
            lr=section.learning_rate,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            fused=True,
        )
        self._momentum = section.momentum
        self._matrix_dtype = matrix_dtype
        self._shards: dict[Tensor, MatrixShards] = {}
        self.must_skip: Callable[[], bool] = lambda: False
        """Called before each update, after the gradient norm is computed."""

    def attach(self, flat: Tensor, shards: MatrixShards) -> None:
        """Set the matrices that a flat slice is made of."""
        self._shards[flat] = shards

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.must_skip():
            return None
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonalize"]]
        try:
            loss = self._step_adamw(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonalize"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        whole = [one for one in group["params"] if one.grad is not None and one.ndim == 2]
        updates = [self._with_momentum(one).to(self._matrix_dtype) for one in whole]
        for weight, update in zip(whole, orthogonalized(updates), strict=True):
            _take(weight, update.to(weight.dtype), group)
        for flat in group["params"]:
            if flat.grad is not None and flat.ndim == 1:
                update = self._with_momentum(flat)
                _take(
                    flat,
                    self._shards[flat].apply(orthogonalized, update, self._matrix_dtype),
                    group,
                )

    def _with_momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        gradient = weight.grad
        assert gradient is not None
        state["momentum"].lerp_(gradient, 1 - self._momentum)
        nesterov: Tensor = gradient.lerp(state["momentum"], self._momentum)
        return nesterov


def _take(weight: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.add_(update, alpha=-group["lr"])


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    shape: ModelSection,
    section: OptimizerSection,
    matrix_dtype: torch.dtype = torch.float32,
) -> MatrixOptimizer:
    """Optimizer of ReverseGPT's parameters, with one group per distinct rule."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        rule = parameter_rule(name, parameter, shape, section)
        key = (rule.learning_rate, rule.weight_decay, rule.is_orthogonalized)
        groups.setdefault(key, []).append(parameter)
    return MatrixOptimizer(
        [
            {
                "params": parameters,
                "lr": peak,
                "peak_learning_rate": peak,
                "weight_decay": weight_decay,
                "orthogonalize": orthogonalize,
            }
            for (peak, weight_decay, orthogonalize), parameters in groups.items()
        ],
        section,
        matrix_dtype,
    )


def attach_shards(
    optimizer: MatrixOptimizer,
    zero: Any,
    stage: int,
    device: torch.device,
    rank: int,
    num_ranks: int,
    group: Any,
) -> None:
    """Attach the slices that DeepSpeed's ZeRO optimizer `zero` has cut the matrices into.

    `rank` is this rank's place among the ranks of a group, each of which has a slice.
    """
    if stage == 3:
        for number, parameters in enumerate(zero.fp16_groups):
            rule = optimizer.param_groups[zero.sub_group_to_group_id[number]]
            if rule["orthogonalize"]:
                slices = slices_of_each(
                    [parameter.partition_numel() for parameter in parameters],
                    [parameter.ds_numel for parameter in parameters],
                    num_ranks,
                )
                shapes = [tuple(parameter.ds_shape) for parameter in parameters]
                shards = MatrixShards(shapes, slices, rank, device, group)
                optimizer.attach(zero.fp32_partitioned_groups_flat[number], shards)
    elif stage:
        for number, parameters in enumerate(zero.round_robin_bit16_groups):
            if optimizer.param_groups[number]["orthogonalize"]:
                slices = slices_of_flat(
                    zero.round_robin_bit16_offsets[number],
                    [parameter.numel() for parameter in parameters],
                    int(zero.partition_size[number]),
                    num_ranks,
                )
                shapes = [tuple(parameter.shape) for parameter in parameters]
                shards = MatrixShards(shapes, slices, rank, device, group)
                optimizer.attach(zero.single_partition_of_fp32_groups[number], shards)
