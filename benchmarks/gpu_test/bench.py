"""The device, size and record of a part of the GPU test."""

import gc
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeVar

import torch

from benchmarks.gpu_test.results import Check, Figure, append_check
from data_pipeline.errors import PreemptedError, UserInterruptError
from megaback.rehearsal.memory_meter import MemoryMeter

Size = Literal["full", "cpu", "smoke"]
"""full: sizes of a large GPU; cpu: minutes on two cores; smoke: seconds."""
WANTS_A_GPU = "wants a GPU"
_Choice = TypeVar("_Choice")


@dataclass
class Bench:
    """The device of a part, and the record of its checks."""

    device: torch.device
    size: Size
    work: Path
    """Folder for what parts write and share."""
    results: Path
    num_devices: int
    failures: int = 0
    meter: MemoryMeter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = MemoryMeter.of(self.device)

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"

    def sized(self, full: _Choice, cpu: _Choice, smoke: _Choice) -> _Choice:
        """The value for the size of this test."""
        return {"full": full, "cpu": cpu, "smoke": smoke}[self.size]

    def require(
        self, name: str, passed: bool, detail: str, claim: str | None = None, **figures: Figure
    ) -> None:
        """Record a check. `detail`: its bound, or what differs."""
        self._record(name, "passed" if passed else "failed", detail, claim, figures)

    def measured(self, name: str, claim: str | None = None, **figures: Figure) -> None:
        """Record figures without a bound."""
        self._record(name, "measured", "", claim, figures)

    def skip(self, name: str, reason: str, claim: str | None = None) -> None:
        self._record(name, "skipped", reason, claim, {})

    @contextmanager
    def attempt(self, name: str, claim: str | None = None) -> Iterator[None]:
        """Record an error as a failed check, and continue after it."""
        try:
            yield
        except (PreemptedError, UserInterruptError):  # this process is asked to end
            raise
        except Exception as error:  # noqa: BLE001 (kernels raise errors of any type)
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            self._record(name, "failed", reason, claim, {})
        finally:
            self.release()

    def release(self) -> None:
        """Free what nothing refers to any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], object], turns: int) -> float:
        """Median wall time, with the work on the device."""
        times_s = []
        for _ in range(turns):
            self.meter.wait()
            started = perf_counter()
            work()
            self.meter.wait()
            times_s.append(perf_counter() - started)
        return statistics.median(times_s)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Peak memory of some work, above that before it."""
        self.release()
        self.meter.wait()
        meter = MemoryMeter.of(self.device)
        work()
        meter.wait()
        return meter.peak_bytes()

    def _record(
        self, name: str, status: str, detail: str, claim: str | None, figures: dict[str, Figure]
    ) -> None:
        check = Check(
            name=name,
            status=status,  # type: ignore[arg-type]
            detail=detail,
            claim=claim,
            figures={key: _rounded(value) for key, value in figures.items()},
        )
        self.failures += status == "failed"
        append_check(self.results, check)
        shown = ", ".join(f"{key} {value}" for key, value in check.figures.items())
        print(
            f"{status}: {name}" + "".join(f"; {one}" for one in (detail, shown) if one), flush=True
        )


def _rounded(value: Figure) -> Figure:
    return float(f"{value:.4g}") if isinstance(value, float) else value
