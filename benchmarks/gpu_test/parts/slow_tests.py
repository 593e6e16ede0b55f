"""The tests of tests/gpu that train."""

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.parts.tests import run_tests


def run(bench: Bench) -> None:
    if not bench.is_gpu:
        bench.skip("tests that train", WANTS_A_GPU)
        return
    run_tests(bench, "slow", 420)
