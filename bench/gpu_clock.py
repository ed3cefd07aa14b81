"""Clocks for work that a device does while the host goes on: GPU time, enqueue time, launches.

On the CPU they are the host's clock, so that what uses them can be tried without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Run = Callable[[], Any]
# Long enough for the host to enqueue some calls, so that the clock does not measure how fast it is. 1 ms at 1.8 GHz.
LEAD_CYCLES = 1_800_000


class Clock:
    """Times on ``device``, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def now(self) -> Any:
        """This moment in the stream, to be given to ``between`` when the device has passed it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self.on_gpu else float(end - begin)

    def lead(self, share: float = 1.0) -> None:
        """Keeps the device busy for a millisecond or so, in which the host gets ahead of it."""
        if self.on_gpu:
            torch.cuda._sleep(int(share * LEAD_CYCLES))

    def per_call(self, runs: Sequence[Run]) -> float:
        """GPU time of a call, taken over all of ``runs`` in a row, which the host enqueues ahead of the device."""
        self.synchronize()
        self.lead()
        begin = self.now()
        for run in runs:
            run()
        end = self.now()
        self.synchronize()
        return self.between(begin, end) / len(runs)

    def graph(self, runs: Sequence[Run]) -> Run:
        """A replay of ``runs`` as one graph.

        Raises:
            RuntimeError: they cannot be recorded. On the CPU nothing can.
        """
        if not self.on_gpu:
            raise RuntimeError("graphs need a GPU")
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for run in runs:
                run()
        return graph.replay

    def enqueue(self, run: Run, repeats: int) -> list[float]:
        """Host time of each of ``repeats`` calls, the device idle at their start."""
        spent = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        self.synchronize()
        return spent

    def launches(self, run: Run) -> list[str]:
        """Names of the kernels, copies and fills that a call starts; none on the CPU."""
        if not self.on_gpu:
            run()
            return []
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            run()
            self.synchronize()
        events = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
        return [event.name for event in events if not getattr(event, "is_user_annotation", False)]


@contextlib.contextmanager
def pinned_to_a_core() -> Iterator[None]:
    """Keeps this thread on one of the cores that it may use."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """20 %, median and 80 %, in microseconds."""
    p20, p80 = (statistics.quantiles(seconds, n=5)[i] for i in (0, 3)) if len(seconds) > 1 else (seconds[0],) * 2
    return 1e6 * p20, 1e6 * statistics.median(seconds), 1e6 * p80
