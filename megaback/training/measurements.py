"""Measurements of a model between training steps: val set, samples and suites, and what they cost.

Training is bit for bit the same with and without them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from data_pipeline.common.durations import duration
from megaback.distributed.world import World
from megaback.faults.stop_request import StopRequest
from megaback.inference.sampling import SamplingOptions
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics
from megaback.tracking.metrics_log import MetricsLog
from megaback.training.run import Run
from megaback.training.samples import write_samples
from megaback.training.suites import measure_suites
from megaback.training.validation import evaluate


class Measurements:
    """Measures the model of a run, with its weights of that moment."""

    def __init__(
        self,
        run: Run,
        world: World,
        stop: StopRequest,
        record: Callable[[Callable[[MetricsLog], None]], None],
    ) -> None:
        """`record` calls a function with the log, on the first rank."""
        self._run, self._world, self._stop, self._record = run, world, stop, record
        self._durations_s: dict[str, float] = {}
        self._last: tuple[int, float] | None = None

    def validate(self, done: int) -> float | None:
        """Loss on the val set in nats per target, with samples; None without a val set."""
        run, world = self._run, self._world
        if not run.data.has_val:
            return None
        with self._timed("val set"):
            measured = evaluate(
                run.engine,
                run.data.validation(world.rank, world.size),
                run.config.batch.context_tokens,
                run.data.codec.piece_num_bytes(),
                world,
                lambda: run.watchdog.set_phase("validating", done),
                is_both=run.data.text_format.both,
                is_compiled=run.compiler is not None,
            )
        texts = self._write_samples(done)
        sample_s = self._durations_s.get("samples")
        self._record(lambda log: log.validation(done, measured, sample_s))
        if texts:
            self._record(lambda log: log.samples(done, texts))
        return measured.whole.nats_per_token

    def _write_samples(self, done: int) -> list[tuple[str, str]]:
        """Each given text of `validation.samples` and the whole one."""
        run, given = self._run, self._run.data.given
        if not given.texts:
            return []
        with self._timed("samples"):
            samples = write_samples(
                run.engine,
                given.prompts,
                given.codec,
                SamplingOptions(
                    max_new_tokens=run.config.validation.sample_tokens,
                    temperature=run.config.validation.sample_temperature,
                    seed=run.config.training.seed,
                ),
                done,
                run.data.micro_batch_rows,
                self._world.device,
                lambda: run.watchdog.set_phase("writing samples", done),
                is_compiled=run.compiler is not None,
            )
        whole = map(given.whole, range(len(samples)), samples)
        return list(zip(given.texts, whole, strict=True))

    def measure_suites(self, done: int, *, is_end: bool = False) -> bool:
        """Measure the suites, if there are any; False if the run has to stop before. Collective."""
        run = self._run
        if run.suites is None:
            return True
        with self._timed("suites"):
            results = measure_suites(
                run.engine,
                run.suites,
                self._world,
                lambda: run.watchdog.set_phase("measuring suites", done),
                lambda: self._stop.reason is not None,
                is_compiled=run.compiler is not None,
            )
        if results is None:
            when = "`megaback eval` measures them" if is_end else "they are measured on resume"
            self._record(
                lambda log: log.message(
                    f"suites of step {done:,}: not measured, as the run has to stop; {when}"
                )
            )
            return False
        fields = {
            name: {key: metric.to_dict() for key, metric in metrics.items()}
            for name, metrics in results.items()
        }
        suite_s, sha256 = self._durations_s["suites"], run.suites.sha256
        self._record(lambda log: log.suites(done, fields, sha256, suite_s))
        return True

    def lacks_suites(self, step: int) -> bool:
        """Whether the metrics have no suites of a step, from which a run resumes. Collective.

        So it is if the run was stopped before, or has suites since then.
        """
        if self._run.suites is None:
            return False
        lacks = self._world.run_collectively(self._first_lacks_suites, step)
        return self._world.of_first(lacks, bool)

    def _first_lacks_suites(self, step: int) -> bool:
        run = self._run.config.run
        if not self._world.is_first or not (run / METRICS_NAME).exists():
            return True
        return not any(line["step"] == step and "suites" in line for line in read_metrics(run))

    def report_cost(self, done: int) -> None:
        """Log the duration of what was measured at a step, and its share of the time."""
        parts, self._durations_s = self._durations_s, {}
        if not parts:
            return
        now, total_s = monotonic(), sum(parts.values())
        share = ""
        if self._last is not None:
            before, ended = self._last
            share = f", {total_s / (now - ended):.1%} of the time since step {before:,}"
        self._last = done, now
        listed = ", ".join(f"{name} {_shown(part_s)}" for name, part_s in parts.items())
        step = f"step {done}/{self._run.data.total_steps}"
        message = f"{step}  measuring took {_shown(total_s)} ({listed}){share}"
        self._record(lambda log: log.message(message))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = monotonic()
        yield
        self._durations_s[name] = monotonic() - started


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
