"""How much memory a call takes at its peak, beyond what there is already: of the process, or of torch's allocator."""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import torch


def _status(field: str) -> int:
    """A size out of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(run: Callable[[], object]) -> int | None:
    """Bytes that ``run`` adds to the resident memory of the process at its peak, its result included. None but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def peak_allocated(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator has handed out at once at the peak of ``run``, those before it not counted.

    Exact on a GPU. On the CPU a sum over what the allocator tells the profiler, whose own memory is not in it; ``run`` must
    free nothing that was there before.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def resident() -> int | None:
    """Bytes of the process in memory, without what was freed. None but on Linux."""
    if not Path("/proc/self/status").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")
