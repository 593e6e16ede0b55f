"""torch.compile: the compiler that it needs, and the number of graphs that it has compiled."""

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from data_pipeline.errors import BackendError
from megaback.config import TrainingSection
from megaback.model.attention_choice import Attention

_LOG = logging.getLogger("megaback.training")


def require_compiler(device_type: str, option: str) -> None:
    """Raises BackendError if there is no compiler, on which torch.compile would fail minutes later.

    `option`: the setting that requests compilation, for the message.
    """
    missing = _missing_compiler(device_type)
    if missing is not None:
        raise BackendError(f"{option} needs a compiler, and {missing}, or unset {option}")


def why_not_compiled(
    training: TrainingSection, stage: int, device_type: str, attention: Attention
) -> str | None:
    """Reason why a model is not compiled for training at a ZeRO stage; None if it is.

    Raises BackendError if compilation is requested and impossible.
    """
    if not training.may_compile_on(device_type == "cpu"):
        return f"training.compile is {training.compile}"
    problem = None
    if stage == 3:
        problem = (
            "zero.stage=3 gathers the weights of each layer within it, where compiled code ends"
        )
    elif training.activation_checkpointing == "block" and not attention.is_traceable:
        problem = (
            "training.activation_checkpointing=block recomputes whole blocks, with attention by "
            f"{attention.name}, which is not compiled"
        )
    if training.compile == "on":
        if problem is not None:
            raise BackendError(f"training.compile is on, but {problem}; set it to auto")
        require_compiler(device_type, "training.compile")
    return problem or _missing_compiler(device_type)


def _missing_compiler(device_type: str) -> str | None:
    if device_type == "cuda":  # Triton compiles the code that launches kernels
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if any(shutil.which(name) for name in names):
        return None
    return f"{' or '.join(names)} is not on the PATH; `apt-get install build-essential`"


def compile_for_any_length(tensor: Tensor) -> None:
    """Have code that is compiled for this tensor serve any length of its first dimension."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, 0)


class GraphCounter:
    """Backend of torch.compile, PyTorch's own, that counts the graphs that it compiles.

    A number that grows after the first steps means that inputs vary in something that compiled code
    takes for constant.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        import torch._dynamo

        self.num_graphs += 1
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(graph, inputs)
        return compiled

    def report_growth(self, before: int, place: str) -> None:
        """Warn if there are more graphs than before, and these were not the first.

        `place`: where they were compiled.
        """
        if 0 < before < self.num_graphs:
            _LOG.warning(
                "%s compiled the model again, which takes minutes: %s graphs, %s before; set "
                "TORCH_LOGS=recompiles to see why",
                place,
                self.num_graphs,
                before,
            )
