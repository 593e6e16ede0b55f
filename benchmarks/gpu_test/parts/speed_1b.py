"""Tokens/s and MFU of the shape of configs/reverse_1b.yaml."""

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.parts.speed import BILLION, measure_shape


def run(bench: Bench) -> None:
    measure_shape(bench, BILLION)
