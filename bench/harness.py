"""How things are measured.

All candidates of a comparison run in one process and take turns, round by round, in an order that rotates; the copy
bandwidth is taken in the same rounds. What is reported are medians and quantiles over rounds. A candidate is checked before
it is timed: a wrong result is never timed. Gradients are put in place between timed stretches, so a stopwatch that only runs
inside them is the timer, for pytest-benchmark too.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import samkern
from samkern.backends import _build_facts

from .machine import RESULTS, device_name
from .shapes import ShapeSet


class Stopwatch:
    """Seconds that have been spent inside of ``running()``. Called like ``time.perf_counter``."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self) -> float:
        return self.total

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.total += time.perf_counter() - start


stopwatch = Stopwatch()


@dataclass
class Candidate:
    """One competitor. ``run`` does what is measured once, and starts the stopwatch itself where it counts.

    ``max_err``: largest difference from the reference's result, relative to its largest entry. ``extra_bytes``: memory
    that it takes at its peak, None: not measured.
    """

    name: str
    run: Callable[[], None]
    max_err: float = float("nan")
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def timed(self) -> None:
        before = stopwatch.total
        self.run()
        self.seconds.append(stopwatch.total - before)


@dataclass
class Row:
    """One measurement, as it goes into the CSV. Times in microseconds, rates in 10^9 bytes per second."""

    measured: str
    method: str
    backend: str
    shape_set: str
    n_tensors: int
    n_params: int
    dtype: str
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    gbps: float
    copy_gbps: float
    pct_copy: float
    max_err: float
    device: str
    threads: int
    torch: str
    samkern: str
    commit: str
    time: str
    extra_bytes: int | None = None


class Copy:
    """torch's copy of one tensor as large as a shape set, for the bandwidth: bytes read and written per second."""

    def __init__(self, n_params: int) -> None:
        self.source, self.target = torch.randn(n_params), torch.empty(n_params)
        self.seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        self.target.copy_(self.source)
        self.seconds.append(time.perf_counter() - start)

    @property
    def gbps(self) -> float:
        return 8 * self.source.numel() / statistics.median(self.seconds) / 1e9


class Harness:
    """Collects the rows of a session."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []

    def compare(
        self,
        benchmark: Callable[..., None],
        shape_set: ShapeSet,
        measured: str,
        method: str,
        candidates: list[Candidate],
        n_bytes: float,
    ) -> None:
        """Times all candidates in turn; the first is ours, and pytest-benchmark's. ``n_bytes``: by formula, per parameter."""
        ours, others = candidates[0], candidates[1:]
        copy, turn = Copy(shape_set.n_params), 0

        def others_first() -> None:
            nonlocal turn
            copy.run()
            for i in range(len(others)):
                others[(i + turn) % len(others)].timed()
            turn += 1

        warm_up = 3
        benchmark.pedantic(ours.timed, setup=others_first, rounds=shape_set.rounds, warmup_rounds=warm_up)
        for candidate in candidates:
            candidate.seconds = candidate.seconds[warm_up : warm_up + shape_set.rounds]
        copy.seconds = copy.seconds[warm_up:]
        for candidate in candidates:
            self.rows.append(self._row(shape_set, measured, method, candidate, n_bytes, copy.gbps))

    def _row(
        self, shape_set: ShapeSet, measured: str, method: str, candidate: Candidate, n_bytes: float, copy_gbps: float
    ) -> Row:
        p20, p50, p80 = (1e6 * q for q in (statistics.quantiles(candidate.seconds, n=5)[i] for i in (0, 2, 3)))
        p50 = 1e6 * statistics.median(candidate.seconds)
        total = round(n_bytes * shape_set.n_params)
        gbps = total / p50 / 1e3
        return Row(
            measured=measured,
            method=method,
            backend=candidate.name,
            shape_set=shape_set.name,
            n_tensors=shape_set.n_tensors,
            n_params=shape_set.n_params,
            dtype="float32",
            p20_us=round(p20, 1),
            p50_us=round(p50, 1),
            p80_us=round(p80, 1),
            bytes=total,
            gbps=round(gbps, 2),
            copy_gbps=round(copy_gbps, 2),
            pct_copy=round(100 * gbps / copy_gbps, 1),
            max_err=candidate.max_err,
            device=device_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            samkern=samkern.__version__,
            commit=(_build_facts() or {}).get("commit", "unknown"),
            time=time.strftime("%Y-%m-%dT%H:%M:%S"),
            extra_bytes=candidate.extra_bytes,
        )

    def write(self) -> Path:
        """Appends the rows to the device's CSV."""
        folder = RESULTS / device_name()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "cpu.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            if new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        return path

    def table(self) -> str:
        """One line per comparison: ours, and how many times as long every peer takes."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.measured, row.method, row.shape_set), []).append(row)
        lines = [
            f"{'measured':<10}{'method':<22}{'shapes':<13}{'ms':>9}{'B/param':>9}{'% copy':>8}   peers, times our time"
        ]
        for (measured, method, shape_set), rows in groups.items():
            ours = rows[0]
            peers = ", ".join(f"{row.backend} {row.p50_us / ours.p50_us:.2f}" for row in rows[1:])
            numbers = f"{ours.p50_us / 1e3:>9.3f}{ours.bytes / ours.n_params:>9.1f}{ours.pct_copy:>8.0f}"
            lines.append(f"{measured:<10}{method:<22}{shape_set:<13}{numbers}   {peers}")
            if any(row.extra_bytes is not None for row in rows):
                extra = ", ".join(
                    f"{row.backend} {row.extra_bytes / 1e6:.1f}" for row in rows if row.extra_bytes is not None
                )
                lines.append(f"{'':<45}   MB at the peak: {extra}")
        return "\n".join([*lines, *self.skipped])
