"""Collectives of a rank without peers: their results, and the bytes that they would send."""

import torch

from megaback.rehearsal.collectives import Collective, CollectiveLog, RehearsalGroup

RANK, RANKS = 2, 4


def group_and_log(name: str = "engine") -> tuple[RehearsalGroup, CollectiveLog]:
    log = CollectiveLog()
    return RehearsalGroup(RANK, RANKS, log, name), log


def sent(log: CollectiveLog, kind: str, name: str = "engine") -> tuple[int, int]:
    key = Collective(0, "starting", kind, name)
    return log.calls[key], log.sent_bytes[key]


def test_a_gathered_tensor_has_this_rank_s_part_and_zeros() -> None:
    group, log = group_and_log()
    output = torch.full((8,), torch.nan)
    group.all_gather_single(output, torch.tensor([5.0, 6.0]))
    assert output.tolist() == [0, 0, 0, 0, 5, 6, 0, 0]
    assert sent(log, "all-gather") == (1, 32 * 3 // 4)


def test_a_gather_in_place_leaves_the_other_parts() -> None:
    group, _ = group_and_log()
    output = torch.arange(8.0)
    group.all_gather_single(output, output[4:6])
    assert output.tolist() == list(range(8))
    parts = list(output.view(RANKS, 2))
    group.allgather([parts], [parts[RANK]])
    assert output.tolist() == list(range(8))


def test_messages_of_the_control_group_come_from_every_rank() -> None:
    group, log = group_and_log("control")
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(RANKS)]
    group.allgather([parts], [torch.tensor([7])])
    assert [int(part) for part in parts] == [7] * RANKS
    assert sent(log, "all-gather", "control") == (1, 24)
    assert sent(log, "all-gather") == (0, 0)


def test_a_sum_is_this_rank_s_term() -> None:
    group, log = group_and_log()
    total = torch.tensor([1.0, 2.0])
    group.allreduce([total])
    part = torch.empty(2)
    group.reduce_scatter_single(part, torch.arange(8.0))
    assert total.tolist() == [1, 2]
    assert part.tolist() == [4, 5]
    assert sent(log, "all-reduce") == (1, 2 * 8 * 3 // 4)
    assert sent(log, "reduce-scatter") == (1, 32 * 3 // 4)


def test_an_exchange_keeps_what_a_rank_sends_to_itself() -> None:
    group, log = group_and_log()
    output = torch.full((5,), torch.nan)
    group.all_to_all_single(output, torch.arange(6.0), [2, 1, 2, 0], [1, 1, 2, 2])
    assert output.tolist() == [0, 0, 0, 2, 3]
    assert sent(log, "all-to-all") == (1, 4 * 4)
    group.all_to_all_single(output[:4], torch.arange(4.0), [], [])
    assert output.tolist() == [0, 0, 2, 0, 3]
    assert sent(log, "all-to-all") == (2, 4 * 4 + 4 * 3)
