"""Deterministic algorithms on CUDA: a resumed run repeats an undisturbed one bit for bit.

On CPUs the algorithms that training uses are deterministic anyway.
"""

import os

import torch
import torch.utils.deterministic

from data_pipeline.errors import BackendError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS is deterministic: its documentation."""


def use_deterministic_algorithms(device_name: str) -> None:
    """Set PyTorch, its compiler and cuBLAS to deterministic algorithms, before CUDA starts.

    `device_name`: as in the config. Raises BackendError if the environment contradicts it.
    """
    if device_name == "cpu" or not torch.cuda.is_available():
        return
    given = os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])
    if given not in _CUBLAS_VALUES:
        raise BackendError(
            f"{_CUBLAS} is {given}, with which cuBLAS is not deterministic; set it to "
            f"{' or '.join(_CUBLAS_VALUES)}, unset it, or set training.deterministic=false"
        )
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    # Otherwise every new tensor is filled, which takes time and helps only to find bugs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
