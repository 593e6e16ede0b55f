"""The parts of the GPU test, in order of importance."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A module of `benchmarks.gpu_test.parts`, run as a process of its own."""

    name: str
    title: str
    limit_s: int
    """Maximum duration, in seconds."""
    is_alone: bool = False
    """Whether it runs without others beside it, as what it measures would change."""
    is_in_smoke_runs: bool = False


PARTS = (
    Part("attention", "attention backends against the definition", 120, is_in_smoke_runs=True),
    Part("zero", "ZeRO 0 to 3 against a plain loop", 180, is_in_smoke_runs=True),
    Part("resume", "resumed runs, bit for bit", 240),
    Part("memory", "memory against `megaback plan`", 240),
    Part("commands", "commands on the device", 180),
    Part("ranks", "several ranks, and a killed one", 240),
    Part("tests", "tests of tests/gpu", 240),
    Part("speed", "speed of the shape of xcoax_100bt", 240, is_alone=True, is_in_smoke_runs=True),
    Part("sampling", "speed of sampling", 100, is_alone=True, is_in_smoke_runs=True),
    Part("waits", "waits of the host, and copies", 90, is_alone=True),
    Part("loss", "loss in chunks", 60, is_alone=True, is_in_smoke_runs=True),
    Part("out_of_memory", "a real lack of memory", 100, is_alone=True),
    Part("gradients", "gradients in fp32", 60, is_alone=True, is_in_smoke_runs=True),
    Part("speed_1b", "speed of the shape of reverse_1b", 240, is_alone=True),
    Part("slow_tests", "tests of tests/gpu that train", 440),
)
BY_NAME = {part.name: part for part in PARTS}
