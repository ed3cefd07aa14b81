"""The machine that is measured, and where its results go."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The processor, as a folder name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name.replace(' ', '-')}-{torch.get_num_threads()}-threads"


def folder(device: torch.device) -> Path:
    """Where the results of a device are: a GPU by its name, else the processor."""
    on_gpu = device.type == "cuda"
    return RESULTS / (torch.cuda.get_device_name(device).replace(" ", "-") if on_gpu else device_name())
