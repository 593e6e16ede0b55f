"""Exchange of tokens for heads, on one rank whose peers send zeros.

Whole runs of ranks that share rows are in tests/integration/test_sequence_parallel.py.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megaback.distributed.sequence_parallel import exchanging_heads
from megaback.model.attention import Segments, sdpa_attention
from megaback.rehearsal.collectives import CollectiveLog, join
from megaback.rehearsal.rank import prepare_deepspeed
from tests.helpers.fake_gpu import counted, gpu, on_fake_gpu

RANK, PARTS = 1, 2
ROWS, PART_TOKENS, HEAD_DIM = 2, 4, 8
LENGTHS = (5, 3, 8)


@on_fake_gpu
def test_a_backend_gets_its_heads_of_whole_rows_on_the_device_without_a_wait() -> None:
    join(RANK, PARTS, CollectiveLog())
    prepare_deepspeed("cpu")
    seen: list[Tensor] = []

    def backend(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
    ) -> Tensor:
        seen.extend((query_THE, key_TKE, value_TKE))
        assert all(heads.stride(-1) == 1 for heads in seen)  # as kernels need them
        return sdpa_attention(query_THE, key_TKE, value_TKE, segments)

    attention = exchanging_heads(backend, dist.group.WORLD)
    of_parts = replace(Segments.from_lengths(LENGTHS, gpu()), divided_rows=ROWS)
    on_cpu = [torch.randn(ROWS * PART_TOKENS, heads, HEAD_DIM) for heads in (4, 1, 1)]
    leaves = [one.to(gpu()).requires_grad_() for one in on_cpu]
    assert of_parts.groups.shapes  # sent to the device here

    with counted() as traffic:
        attended_THE = attention(*leaves, of_parts)
        attended_THE.sum().backward()

    assert traffic.syncs == traffic.to_host == traffic.to_device == [], traffic
    assert attended_THE.shape == leaves[0].shape
    assert [tuple(heads.shape) for heads in seen] == [(16, 2, 8), (16, 1, 8), (16, 1, 8)]
    for heads, sent in zip(seen, on_cpu, strict=True):
        by_row = heads.detach().cpu().view(ROWS, PARTS, PART_TOKENS, -1, HEAD_DIM)
        own = sent[:, -heads.shape[1] :].view(ROWS, PART_TOKENS, -1, HEAD_DIM)
        torch.testing.assert_close(by_row[:, RANK], own)
        assert not by_row[:, 0].any()
    assert all(leaf.grad is not None and leaf.grad.device == gpu() for leaf in leaves)


@on_fake_gpu
def test_whole_tokens_are_not_exchanged() -> None:
    log = CollectiveLog()
    join(RANK, PARTS, log)
    prepare_deepspeed("cpu")
    heads = torch.randn(16, 4, HEAD_DIM, device=gpu())
    segments = Segments.from_lengths(LENGTHS, gpu())

    found = exchanging_heads(sdpa_attention, dist.group.WORLD)(heads, heads, heads, segments)

    torch.testing.assert_close(found, sdpa_attention(heads, heads, heads, segments))
    assert not any(one.kind == "all-to-all" for one in log.calls)
