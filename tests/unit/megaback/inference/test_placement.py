"""The data type of a model's weights, by the device."""

from contextlib import nullcontext

import pytest
import torch

from data_pipeline.errors import BackendError
from megaback.inference.placement import choose_dtype, dtype_name

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_on_a_gpu_that_computes_in_it(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def current(device: object) -> nullcontext[None]:
        asked.append(device)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)

    assert choose_dtype("auto", GPU) is dtype
    assert asked == [GPU]
    assert choose_dtype("float32", GPU) is torch.float32


def test_auto_is_fp32_on_a_cpu_and_others_are_as_named() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert dtype_name(choose_dtype("bfloat16", CPU)) == "bfloat16"


def test_another_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(BackendError, match="`dtype` is 'fp16'; use auto, float32, bfloat16"):
        choose_dtype("fp16", CPU)
