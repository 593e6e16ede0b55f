"""All-to-all exchanges of tokens for heads by ranks that share rows. Loads no torch.

Forward, each block sends queries, keys and values to the ranks that have their heads, and the
results back; backward, their gradients take the same way. Blocks that are recomputed exchange
forward twice.
"""

from dataclasses import dataclass

from megaback.config import Config


@dataclass(frozen=True)
class SequenceExchange:
    """Bytes that a rank sends per step, to the other ranks of its group."""

    sent_bytes: float
    calls: int
    is_within_node: bool
    is_of_all_ranks: bool = False


NO_EXCHANGE = SequenceExchange(0.0, 0, is_within_node=True)


def sequence_exchange(
    config: Config, micro_rows: int, accumulation_steps: int, ranks: int, ranks_per_node: int
) -> SequenceExchange:
    """Exchange of a rank per step."""
    shape, parts = config.model, config.batch.sequence_parallel
    if parts == 1:
        return NO_EXCHANGE
    heads = 2 * shape.num_heads + 2 * max(shape.kv_heads, parts)
    passes = 3 if config.training.activation_checkpointing == "block" else 2
    size = 2 if config.training.precision == "bf16" else 4
    tokens = accumulation_steps * micro_rows * config.batch.part_tokens
    width = size * shape.head_size * heads
    return SequenceExchange(
        passes * shape.num_layers * tokens * width * (parts - 1) / parts,
        2 * passes * shape.num_layers * accumulation_steps,
        is_within_node=ranks_per_node % parts == 0,
        is_of_all_ranks=ranks == parts,
    )
