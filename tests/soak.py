"""make soak: random cases with fresh seeds beside long trainings, for 20 minutes. Nothing may fail, and no memory grow.

::

    python -m tests.soak --minutes 20 --seed 7

A case that fails is printed with its seed. Memory is looked at between two cases, when nothing of them should be left: the
process as a whole, Python's objects, tensors among them, and what torch has on a GPU.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.memory import resident

from .cases import SUBJECTS, Subject, draw_case
from .conftest import BUILT, on
from .methods import BASES, MOMENTUM, Base
from .problems import closure_for, make_net, through_a_file
from .trial import Trial

# What may be there at the end that was not when the warm-up was over: less than any leak leaves of thousands of steps.
# Allocators and the caches of Python and torch go on filling slowly.
ALLOWED = {"resident": 12e6, "tensors": 64, "objects": 2_000, "cuda": 1e6}
WARM_UP, LEAST = 0.3, 12  # share of the samples, and how many there are at least
CASES, STEPS = 10, 2  # of a round


class LongTraining:
    """One that takes steps as long as all else runs; it is copied and resumed now and then."""

    def __init__(self, subject: Subject, base: Base, backend: str) -> None:
        self.subject, self.base, self.backend, self.t = subject, base, backend, 0
        with on(backend):
            self.net = make_net(torch.float32)
            self.opt = self.make()

    def make(self) -> Any:
        options = {"backend": self.backend, "model": self.net}
        return self.subject.method.make(self.net.parameters(), self.base, **options)

    def go_on(self, n: int) -> None:
        with on(self.backend):
            self.take_steps(n)

    def take_steps(self, n: int) -> None:
        for _ in range(n):
            closure = self.closure(self.t)
            if "validation" in self.subject.calls:
                self.opt.step(closure, val_closure=self.closure(self.t + 1))
            else:
                self.opt.step(closure)
            self.t += 1
        if self.t % 100 == 0:
            resumed = self.make()
            resumed.load_state_dict(through_a_file(self.opt.state_dict()))
            self.opt = resumed

    def closure(self, t: int) -> Callable[[], Tensor]:
        return closure_for(self.net, t % 64, self.opt.zero_grad, torch.float32)


def look() -> dict[str, int]:
    """What is in use."""
    gc.collect()
    everything = gc.get_objects()
    counts = {"tensors": sum(issubclass(type(x), Tensor) for x in everything), "objects": len(everything)}
    del everything
    if (size := resident()) is not None:
        counts["resident"] = size
    if torch.cuda.is_available():
        counts["cuda"] = torch.cuda.memory_allocated()
    return counts


def growth(samples: Sequence[tuple[float, int]]) -> float:
    """How much a quantity has grown after the warm-up, by the median slope between any two samples.

    Single samples may be far off, and steps that even out count little.
    """
    rest = samples[int(WARM_UP * len(samples)) :]
    slopes = [(y - x) / (b - a) for (a, x), (b, y) in itertools.combinations(rest, 2)]
    return statistics.median(slopes) * (rest[-1][0] - rest[0][0])


def soak(minutes: float, seed: int, leaks: Sequence[Callable[[], None]] = ()) -> int:
    """Returns how many kinds of memory have grown, or 1 if a case failed."""
    chance, n_cases = random.Random(seed), 0
    interval = min(20.0, 60 * minutes / 40)
    trainings = [
        LongTraining(subject, MOMENTUM if subject.method.name == "MSAM" else BASES[i % len(BASES)], backend)
        for i, subject in enumerate(SUBJECTS)
        for backend in BUILT
        if backend != "reference"
    ]
    seen: dict[str, list[tuple[float, int]]] = {}
    due = start = time.monotonic()
    while (now := time.monotonic()) < start + 60 * minutes or len(seen.get("objects", ())) < LEAST:
        if now >= due:
            due = now + interval
            for name, value in look().items():
                seen.setdefault(name, []).append((now - start, value))
            report(now - start, n_cases, trainings, seen)
        for _ in range(CASES):
            number, n_cases = chance.randrange(2**48), n_cases + 1
            if not passes(number, chance.choice([*BUILT, "cpu", "cpu", "cpu"])):
                return 1
            for leak in leaks:
                leak()
        for training in trainings:
            training.go_on(STEPS)
    grown = {name: growth(samples) for name, samples in seen.items()}
    for name, value in grown.items():
        verdict = "has grown" if value > ALLOWED[name] else "ok"
        print(f"{name:<9} {value:+14,.0f} after the warm-up, allowed {ALLOWED[name]:,.0f}: {verdict}")
    return sum(value > ALLOWED[name] for name, value in grown.items())


def passes(number: int, backend: str) -> bool:
    """Runs one case. If it fails, it is printed."""
    case = draw_case(random.Random(number).choice)
    with on(backend), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="half-precision weights lose perturbations")
        try:
            Trial(case, backend).run()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            print(f"case {number} on {backend}: {case}")
            return False
    return True


def report(seconds: float, n_cases: int, trainings: Sequence[LongTraining], seen: dict[str, Any]) -> None:
    steps = sum(training.t for training in trainings)
    now = {name: samples[-1][1] for name, samples in seen.items()}
    sizes = [f"{name} {now[name] / 1e6:.1f} MB" for name in ("resident", "cuda") if name in now]
    counts = [f"{name} {now[name]:,}" for name in ("tensors", "objects")]
    print(f"{seconds:6.0f} s  {n_cases:,} cases  {steps:,} steps  " + "  ".join(sizes + counts), flush=True)


LEAKED: list[Any] = []
LEAKS = {
    "tensors": lambda: LEAKED.extend(torch.zeros(1) for _ in range(5)),
    "objects": lambda: LEAKED.extend([] for _ in range(100)),
    "resident": lambda: LEAKED.append(bytes(range(256)) * 4096),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=None, help="of all cases; by default another one every time")
    parser.add_argument("--case", type=int, nargs="+", help="runs only these, on --backend")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--leak", choices=list(LEAKS), nargs="+", default=[], help="leaks on purpose, to see it found")
    options = parser.parse_args(arguments)
    if options.case:
        return sum(not passes(number, options.backend) for number in options.case)
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    print(f"seed {seed}")
    return soak(options.minutes, seed, [LEAKS[name] for name in options.leak])


if __name__ == "__main__":
    sys.exit(main())
