"""FlashAttention's kernels: found by their functions, and called with their own arguments."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megaback.model.attention import AttentionBackend, Segments, padded_boundaries, sdpa_attention
from megaback.model.flash_attention import FLASH_ATTN, FLASH_ATTN_4, VARLEN
from tests.helpers.small_models import VOCAB_SIZE, make_model, packed, random_ids
from tests.helpers.varlen_on_cpu import varlen_on_cpu

CPU = torch.device("cpu")
LENGTHS = (1, 7, 40, 12, 4)
VERSION_2 = """
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
):
    assert causal and max_seqlen_q == max_seqlen_k == 40
    calls.append(deterministic)
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1)
calls = []
"""
VERSION_4 = """
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, deterministic=False,
):
    assert qv is None and causal and cu_seqlens_q is cu_seqlens_k
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1), None
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`install(file, code)`: a module of a package `flash_attn`, without any other file."""

    def write(file: str, code: str) -> None:
        path = tmp_path / "flash_attn" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)

    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write  # type: ignore[misc]
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def call(backend: AttentionBackend) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    heads = (torch.randn(sum(LENGTHS), number, 8, generator=generator) for number in (4, 2, 2))
    return backend(*heads, Segments.from_lengths(LENGTHS, CPU))


def test_the_package_of_flash_attn_4_is_not_taken_for_version_2(
    install: Callable[[str, str], None],
) -> None:
    install("cute/interface.py", VERSION_4)

    assert importlib.import_module("flash_attn").__file__ is None  # it can be imported
    with pytest.raises(ImportError, match="flash_attn has no flash_attn_varlen_func"):
        FLASH_ATTN.load()
    assert call(FLASH_ATTN_4.load()).shape == (sum(LENGTHS), 4, 8)


def test_version_2_is_not_taken_for_flash_attn_4(install: Callable[[str, str], None]) -> None:
    install("__init__.py", VERSION_2)

    with pytest.raises(ImportError, match=r"flash_attn\.cute"):
        FLASH_ATTN_4.load()
    assert call(FLASH_ATTN.load()).shape == (sum(LENGTHS), 4, 8)


def test_flash_attention_is_deterministic_if_pytorch_is(
    install: Callable[[str, str], None],
) -> None:
    install("__init__.py", VERSION_2)
    backend = FLASH_ATTN.load()

    call(backend)
    torch.use_deterministic_algorithms(True)
    try:
        call(backend)
    finally:
        torch.use_deterministic_algorithms(False)

    assert importlib.import_module("flash_attn").calls == [False, True]


def test_a_function_of_another_version_is_named_with_what_it_lacks(
    install: Callable[[str, str], None],
) -> None:
    install("__init__.py", "def flash_attn_varlen_func(q, k, v, cu_seqlens_q): ...")

    with pytest.raises(ImportError, match="flash_attn_varlen_func has no parameter causal"):
        FLASH_ATTN.load()


def test_the_varlen_of_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        """The signature of torch 2.10."""

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    with pytest.raises(ImportError, match="varlen_attn has no parameter window_size"):
        VARLEN.load()
    monkeypatch.delattr(varlen, "varlen_attn")
    with pytest.raises(ImportError, match=r"torch\.nn\.attention\.varlen has no varlen_attn"):
        VARLEN.load()


def test_varlen_without_enable_gqa_is_called_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        """The signature of torch 2.11, less what is not used."""
        return query

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert call(VARLEN.load()).shape == (sum(LENGTHS), 4, 8)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["none", "selective", "block"])
def test_varlen_gives_the_losses_and_gradients_of_sdpa(kind: str, num_kv_heads: int) -> None:
    ids_T, targets_T = random_ids(sum(LENGTHS)), random_ids(sum(LENGTHS), seed=1)
    positions_T, segments = packed(*LENGTHS)
    edges = torch.from_numpy(padded_boundaries(segments.cu_seqlens.numpy()))
    padded = Segments(edges, LENGTHS, VOCAB_SIZE)
    losses, gradients = [], []
    for backend, of_backend in ((sdpa_attention, segments), (varlen_on_cpu(), padded)):
        model = make_model(num_kv_heads=num_kv_heads).train()
        model.checkpoint_activations(kind)
        for block in model.model.layers:
            block.self_attn.backend = backend
        nats_T = model(ids_T, targets_T, positions_T, of_backend)
        nats_T.mean().backward()
        losses.append(nats_T.detach())
        gradients.append([weight.grad for weight in model.parameters()])

    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


def test_the_varlen_of_this_torch_takes_bf16_and_gives_the_shape_of_its_queries() -> None:
    """Traced with fake tensors: the function is PyTorch's, and no kernel runs."""
    with FakeTensorMode():
        heads = [torch.empty(64, number, 8, dtype=torch.bfloat16) for number in (4, 2, 2)]
        edges = torch.empty(9, dtype=torch.int32)
        leaves = [one.requires_grad_() for one in heads]
        attended_THE = VARLEN.load()(*leaves, Segments(edges, (64,), 64))
        gradients = torch.autograd.grad(attended_THE.float().sum(), leaves)

    assert (attended_THE.shape, attended_THE.dtype) == ((64, 4, 8), torch.bfloat16)
    assert [one.shape for one in gradients] == [one.shape for one in heads]


def test_queries_keys_and_values_have_one_dtype_in_autocast() -> None:
    """As bf16 at ZeRO stage 0 does, where weights of norms are fp32."""
    model = make_model().train()
    dtypes = []

    def backend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return sdpa_attention(query, key, value, segments)

    for block in model.model.layers:
        block.self_attn.backend = backend
    with torch.autocast("cpu", torch.bfloat16):
        model.logits(random_ids(20), *packed(20))

    assert dtypes == [{torch.bfloat16}] * 2
