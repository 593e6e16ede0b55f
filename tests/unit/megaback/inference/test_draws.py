"""Numbers sent ahead are those that a row would draw one at a time."""

import numpy as np
import torch

from megaback.inference.draws import DrawStream, DrawTable


def drawn_singly(seed: int, count: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return [float(generator.random(dtype=np.float32)) for _ in range(count)]


def test_rows_that_join_move_and_leave_use_their_own_numbers_in_order() -> None:
    table = DrawTable(3, torch.device("cpu"))
    streams = {seed: DrawStream(seed) for seed in range(3)}
    used: dict[int, list[float]] = {seed: [] for seed in streams}
    rows: list[int] = []

    def join(seed: int) -> None:
        table.set(len(rows), streams[seed])
        rows.append(seed)

    def run(steps: int) -> None:
        for _ in range(steps):
            for row, seed in enumerate(rows):
                used[seed].append(float(table.current[row]))
            table.advance_on_device()
            table.advance([streams[seed] for seed in rows])

    join(0)
    run(50)
    join(1)
    join(2)
    run(100)
    table.move(2, 0)  # 0 leaves, and the last row takes its slot
    rows[0] = rows.pop()
    run(70)
    join(0)  # and continues where it left
    run(200)

    assert used == {seed: drawn_singly(seed, len(numbers)) for seed, numbers in used.items()}
    assert {seed: len(numbers) for seed, numbers in used.items()} == {0: 350, 1: 370, 2: 370}
