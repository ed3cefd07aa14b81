"""Whole SAM steps without forward and backward, against every peer that is here.

A step takes as long as the slower of device and host: with the device kept busy until the host is ahead, events give the
device's time of each half; the host's clock gives its own. Gradients are put in place outside of both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import peers
from .gpu_session import Case, OutOfTimeError, Session, check

COMPILES = ("ResNet-18", "ViT-S/16")
COMPILE_SECONDS = 45.0
KEPT_FOR_OTHERS = 25.0  # seconds that compiling leaves to what comes after it
TINY_EAGER = 4000  # tensors beyond which one launch per tensor and line is left out: half a second a step


class Entry:
    """A stepper, the gradients that it is fed, and what its steps took: seconds of the device and of the host."""

    def __init__(self, stepper: Any, name: str, g: list[Tensor], g_s: list[Tensor]) -> None:
        self.stepper, self.name, self.g, self.g_s = stepper, name, g, g_s
        self.spent: list[tuple[float, float]] = []
        self.error = float("nan")

    def halves(self) -> Iterator[Callable[[], Any]]:
        """Each half when its gradients are in place."""
        for grads, half in ((self.g, self.stepper.first), (self.g_s, self.stepper.second)):
            for p, grad in zip(self.stepper.params, grads, strict=True):
                p.grad = grad
            yield half

    def step(self) -> None:
        for half in self.halves():
            half()

    def timed(self, session: Session) -> None:
        """One step, on top of ``spent``."""
        on_device = on_host = 0.0
        for half in self.halves():
            session.clock.synchronize()
            session.clock.lead()
            begin, start = session.clock.now(), time.perf_counter()
            half()
            on_host += time.perf_counter() - start
            end = session.clock.now()
            session.clock.synchronize()
            on_device += session.clock.between(begin, end)
        self.spent.append((on_device, on_host))


def makers(session: Session, case: Case) -> dict[str, Callable[[list[Tensor]], Any]]:
    """Steppers by name: ours on every backend, then the peers."""
    made: dict[str, Callable[[list[Tensor]], Any]] = {
        name: (lambda w, name=name: peers.Ours(w, backend=name)) for name in session.backends
    }
    made[peers.ForeachChain.name] = peers.ForeachChain
    if case.shape_set.n_tensors <= TINY_EAGER:
        made[peers.EagerLoop.name] = peers.EagerLoop
        if importlib.util.find_spec("pytorch_optimizer") is not None:
            made["pytorch_optimizer foreach"] = lambda w: peers.PytorchOptimizer(w, "SAM", foreach=True)
    return made


def entry(case: Case, device: torch.device, name: str, make: Callable[[list[Tensor]], Any], g: Any, g_s: Any) -> Entry:
    """Every entry has the same weights, and shares the gradients, which no SAM step writes."""
    torch.manual_seed(2)
    return Entry(make(case.tensors(device)), name, g, g_s)


def allocated(session: Session) -> int:
    if not session.clock.on_gpu:
        return 0
    session.clock.synchronize()
    return torch.cuda.memory_allocated(session.device)


def extra_bytes(session: Session, one: Entry, before: int) -> float:
    """Beyond weights, their copy and the momentum buffers, which are fp32 in ours."""
    if not session.clock.on_gpu:
        return float("nan")
    params = one.stepper.params
    due = sum(2 * p.nbytes for p in params) + sum(x.nbytes for s in one.stepper.opt.state.values() for x in s.values())
    return float(allocated(session) - before - due)


def whole_steps(session: Session, case: Case, seconds: float, rounds: int = 15) -> None:
    """Rows of a SAM step with SGD, all candidates by turns, for about ``seconds``."""
    session.require(seconds)
    torch.manual_seed(1)
    g, g_s = case.tensors(session.device), case.tensors(session.device)
    # The reference starts a dozen kernels a tensor; of the tiniest lists, torch's own list kernels are the judge.
    few = case.shape_set.n_tensors <= TINY_EAGER
    judge: Callable[[list[Tensor]], Any] = (lambda w: peers.Ours(w, backend="reference")) if few else peers.ForeachChain
    reference = entry(case, session.device, "reference", judge, g, g_s)
    reference.step()
    entries, extra = [], {}
    for name, make in makers(session, case).items():
        before = allocated(session)
        one = entry(case, session.device, name, make, g, g_s)
        one.step()
        if name in session.backends:
            for p in one.stepper.params:
                p.grad = None  # shared, and not ours
            extra[name] = extra_bytes(session, one, before)
        try:
            one.error = check(name, case, one.stepper.params, reference.stepper.params)
        except AssertionError as error:
            if name in session.backends:
                raise
            session.note(str(error))
            continue
        entries.append(one)
    if case.shape_set.name in COMPILES and case.dtype == torch.float32:
        entries += compiled(session, case, g, g_s, reference)
    del reference
    deadline = time.perf_counter() + seconds
    for turn in range(rounds + 2):
        for k in range(len(entries)):
            entries[(k + turn) % len(entries)].timed(session)
        if turn >= 4 and time.perf_counter() > deadline:
            break
    for one in entries:
        on_device, on_host = zip(*one.spent[2:], strict=True)
        session.add(
            case,
            on_device,
            measured="step",
            method="SAM SGD",
            backend=one.name,
            mode="plain",
            cpu_us=1e6 * statistics.median(on_host),
            max_err=one.error,
            extra_bytes=extra.get(one.name, float("nan")),
        )


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raises ``OutOfTimeError`` in the block after ``seconds``. In the main thread only."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compiled(session: Session, case: Case, g: list[Tensor], g_s: list[Tensor], reference: Entry) -> list[Entry]:
    """The reference passes under torch.compile, if that does not take too long."""
    seconds = min(COMPILE_SECONDS, session.left - KEPT_FOR_OTHERS)
    if seconds < 10:
        session.note(f"torch.compile of {case.name} was left out: no time")
        return []
    try:
        with interrupted_after(seconds):
            one = entry(case, session.device, peers.Compiled.name, peers.Compiled, g, g_s)
            one.step()
    except OutOfTimeError:
        session.note(f"torch.compile of {case.name} was given up after {seconds:.0f} s")
        return []
    except Exception as error:  # whatever a compiler may raise: the others are measured all the same
        session.note(f"torch.compile of {case.name} failed: {str(error).splitlines()[0][:200]}")
        return []
    one.error = check(one.name, case, one.stepper.params, reference.stepper.params)
    return [one]
