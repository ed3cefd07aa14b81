"""What a step takes and how much of that is the optimizer's own, measured without waiting for the device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """Moments of a step: around it, and around each forward-backward pair in it."""

    begin: Any
    end: Any = None
    pairs: list[tuple[Any, Any]] = field(default_factory=list)


class StepClock:
    """Collects moments, and makes times of them when asked: on a GPU they are events on its stream.

    Recording an event costs about a microsecond, so every step is measured: on the CPU a moment is a reading of the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.steps: list[Step] = []

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> Step:
        """A new step that begins now."""
        step = Step(self.now())
        self.steps.append(step)
        return step

    def milliseconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self._on_gpu else 1e3 * (end - begin)

    def summary(self) -> tuple[float, float]:
        """Milliseconds of a mean step, and the share of it outside of the pairs. The device must have been waited for.

        A median over all steps would be that of a step with one pair wherever most have one, so the median is taken of
        each kind (with one pair, with two) and the kinds are weighted as they occurred.
        """
        whole: dict[int, list[float]] = {}
        inside: dict[int, list[float]] = {}
        for step in self.steps:
            kind = len(step.pairs)
            whole.setdefault(kind, []).append(self.milliseconds(step.begin, step.end))
            inside.setdefault(kind, []).append(sum(self.milliseconds(*pair) for pair in step.pairs))
        total = mean_of_medians(whole)
        return total, 1 - mean_of_medians(inside) / total


def mean_of_medians(by_kind: dict[int, list[float]]) -> float:
    """Medians of each kind, weighted by how many values there are of it."""
    n = sum(map(len, by_kind.values()))
    return sum(statistics.median(values) * len(values) / n for values in by_kind.values())
