"""How much memory a call takes at its peak, beyond what the process has already."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


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


def resident() -> int | None:
    """Bytes of the process in memory, without what was freed. None but on Linux."""
    if not Path("/proc/self/status").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")
