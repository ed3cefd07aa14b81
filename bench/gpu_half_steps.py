"""Half-steps and list ops of ours alone: GPU time as a share of the copy rate, host time, launches.

For the share, inputs that together exceed the cache take turns, and graphs of them are replayed where they can be recorded.
Bytes by formula, per parameter, as operands in the dtype of the weights and in fp32; the check of the second gradient, which
reads it once more, is part of it.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import samkern

from .gpu_clock import Run, pinned_to_a_core
from .gpu_rows import NAN
from .gpu_session import Case, Session, check
from .peers import Mean
from .test_passes import PASSES, Lists

SGD = (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4})
ADAMW = (torch.optim.AdamW, {"lr": 1e-4})


def averaged_sam(params: list[torch.nn.Parameter], *args: Any, **options: Any) -> samkern.SAM:
    """SAM whose updates take the weights into their mean."""
    opt = samkern.SAM(params, *args, **options)
    opt.attach(Mean(params))
    return opt


@dataclass(frozen=True)
class Method:
    """``halves``: bytes of each kind of half-step that is measured, as (operands of weights, operands in fp32)."""

    name: str
    make: Callable[..., samkern.SharpnessAware]
    base: tuple[Any, dict[str, Any]]
    halves: dict[str, tuple[int, int]]
    options: dict[str, Any]
    reuses: bool = False


METHODS = (
    Method("SAM SGD", samkern.SAM, SGD, {"perturb": (5, 0), "update": (4, 2)}, {}),
    Method("SAM AdamW", samkern.SAM, ADAMW, {"update": (4, 4)}, {}),
    Method("LookSAM SGD", samkern.LookSAM, SGD, {"update": (6, 3), "reuse": (4, 3)}, {"k": 2}, reuses=True),
    Method("ASAM element", samkern.ASAM, SGD, {"perturb": (6, 0)}, {"mode": "element"}),
    Method("ASAM filter", samkern.ASAM, SGD, {"perturb": (6, 0)}, {"mode": "filter"}),
    Method("SAM averaged", averaged_sam, SGD, {"update": (4, 4)}, {}),
)


class Rig:
    """An optimizer on gradients that stay where they are. A reuse takes its gradient from where a look has its first."""

    def __init__(
        self, case: Case, device: torch.device, method: Method, backend: str, capturable: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(x) for x in case.tensors(device)]
        self.g, self.g_s = case.tensors(device), case.tensors(device)
        cls, options = method.base
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half-precision weights lose perturbations; not what is measured here
            self.opt = method.make(
                self.params, cls, backend=backend, capturable=capturable, **options, **method.options
            )
        self.opt._fixed.lend = lambda: None  # type: ignore[method-assign]  # second gradients are ours: none to be zeroed
        self.halves: dict[str, Run] = {"perturb": self.perturb, "update": self.update}
        if method.reuses:
            self.halves["reuse"] = self.reuse

    def feed(self, grads: list[Tensor]) -> None:
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad

    def perturb(self) -> None:
        self.feed(self.g)
        self.opt.first_step()

    def update(self) -> None:
        self.feed(self.g_s)
        self.opt.second_step()

    def reuse(self) -> None:
        self.feed(self.g)
        self.opt.first_step()
        self.opt.second_step()

    def state(self) -> Tensor:
        """A copy of some of the base's state, which every step changes."""
        p = next(p for p in self.params if p.numel() > 0)
        return next(x for key, x in self.opt.state[p].items() if key != "step").clone()

    def written(self) -> list[Tensor]:
        """Weights, and their averages if there are any."""
        means = [x for x in self.opt._companions if isinstance(x, Mean)]
        return [*self.params, *(average for mean in means for average in mean.averages)]

    def cycle(self) -> None:
        """A look, and what comes until the next."""
        for half in self.halves.values():
            half()


def checked_rig(session: Session, case: Case, method: Method, backend: str) -> float:
    """The error after two cycles, against the reference. Two: state that was wrong shows."""
    rigs = [Rig(case, session.device, method, name) for name in (backend, "reference")]
    for rig in rigs:
        rig.cycle()
        rig.cycle()
    return check(f"{method.name}, {backend}", case, rigs[0].written(), rigs[1].written())


def recorded(session: Session, rigs: list[Rig]) -> dict[str, Run]:
    """A replay per kind of half-step: of that half of every rig.

    Raises:
        RuntimeError: they cannot be recorded, or replays leave the optimizers as they were.
    """
    for rig in rigs:
        rig.cycle()
        rig.cycle()
    replays = {name: session.clock.graph([rig.halves[name] for rig in rigs]) for name in rigs[0].halves}
    before = [rig.state() for rig in rigs]
    for replay in replays.values():
        replay()
    if any(torch.equal(old, rig.state()) for old, rig in zip(before, rigs, strict=True)):
        raise RuntimeError("a replay did nothing")
    return replays


def timers(session: Session, case: Case, method: Method, backend: str) -> tuple[str, Callable[[], dict[str, float]]]:
    """ "graph" or "plain", and a function that measures every half-step once: seconds of a call."""
    # What a half-step touches at least: its weights and gradients.
    n_sets = session.sets_beyond_cache(case.bytes(3, 0))
    clock = session.clock
    try:
        rigs = [Rig(case, session.device, method, backend, capturable=True) for _ in range(n_sets)]
        replays = recorded(session, rigs)
        keep = (rigs, replays)
        return "graph", lambda: {name: clock.per_call([replay] * 2) / len(keep[0]) for name, replay in replays.items()}
    except (RuntimeError, ValueError) as error:
        if clock.on_gpu:
            session.note(f"{method.name}, {backend}, {case.name} is not recorded: {str(error).splitlines()[0][:200]}")
    rigs = [Rig(case, session.device, method, backend) for _ in range(n_sets)]
    for rig in rigs:
        rig.cycle()

    def measure() -> dict[str, float]:
        seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in rigs[0].halves}
        clock.synchronize()
        clock.lead(8.0)  # gradients are put in place in between
        for rig in rigs:
            for name, half in rig.halves.items():
                begin = clock.now()
                half()
                seen[name].append((begin, clock.now()))
        clock.synchronize()
        return {name: statistics.median(clock.between(*pair) for pair in pairs) for name, pairs in seen.items()}

    return "plain", measure


def roofline(session: Session, case: Case, methods: tuple[Method, ...] = METHODS, rounds: int = 12) -> None:
    """Rows of every half-step that is to run at the copy rate."""
    copies, copied = session.copies(case.bytes(5, 0))
    for method in methods:
        if method.name == "ASAM filter" and all(len(shape) < 2 for shape in case.shape_set.shapes):
            continue  # one filter an entry: element-wise
        session.require(4)
        errors = {backend: checked_rig(session, case, method, backend) for backend in session.backends}
        measured = {backend: timers(session, case, method, backend) for backend in session.backends}
        spent: dict[tuple[str, str], list[float]] = {}
        copying: list[float] = []
        for turn in range(rounds + 1):
            copying.append(session.clock.per_call(copies * 2))
            order = session.backends[turn % 2 :: 1] + session.backends[: turn % 2]
            for backend in order:
                for half, seconds in measured[backend][1]().items():
                    spent.setdefault((backend, half), []).append(seconds)
        copy_gbps = copied / statistics.median(copying[1:]) / 1e9
        for (backend, half), seconds in spent.items():
            if half in method.halves:
                session.add(
                    case,
                    seconds[1:],
                    case.bytes(*method.halves[half]),
                    copy_gbps,
                    measured=half,
                    method=method.name,
                    backend=backend,
                    mode=measured[backend][0],
                    cache="cold",
                    max_err=errors[backend],
                )
        del measured


def host_time(session: Session, case: Case, repeats: int = 200) -> None:
    """Rows with the host's time of every half-step from an idle device, pinned to a core."""
    for backend in session.backends:
        for method in METHODS[:4]:
            session.require(2)
            rig = Rig(case, session.device, method, backend)
            for _ in range(3):
                rig.cycle()
            spent: dict[str, list[float]] = {name: [] for name in rig.halves}
            with pinned_to_a_core():
                for _ in range(repeats):
                    for name in rig.halves:
                        spent[name].append(_one_half(session, rig, name))
            for name in method.halves:
                cpu_us = 1e6 * statistics.median(spent[name])
                session.add(case, measured=name, method=method.name, backend=backend, mode="idle", cpu_us=cpu_us)


def _one_half(session: Session, rig: Rig, name: str) -> float:
    """Host seconds in our code: the gradients are put in place before."""
    rig.feed(rig.g_s if name == "update" else rig.g)
    calls = {"perturb": [rig.opt.first_step], "update": [rig.opt.second_step]}
    both = calls.get(name, [rig.opt.first_step, rig.opt.second_step])
    return session.clock.enqueue(lambda: [call() for call in both], 1)[0]


def launches(session: Session, case: Case) -> None:
    """Rows with the launches of every half-step, uploads between looks and reuses included.

    After all that is timed: the profiler leaves hooks behind that every later launch passes.
    """
    for backend in session.backends:
        for method in METHODS:
            session.require(1)
            rig = Rig(case, session.device, method, backend)
            for _ in range(3):
                rig.cycle()
            n = {name: len(session.clock.launches(half)) for name, half in rig.halves.items()}
            for name in method.halves:
                fields = {"measured": name, "method": method.name, "backend": backend, "mode": "profiler"}
                session.add(case, launches=n[name] if session.clock.on_gpu else NAN, **fields)


# The operands that a list op moves, which test_passes has as bytes of fp32.
OPERANDS = {
    "norms": (1, 0),
    "difference_dot": (4, 0),
    "perturb": (5, 0),
    "gaussian_perturb": (4, 0),
    "restore": (2, 0),
    "decompose": (2, 1),
    "combine": (2, 1),
    "update_sgd": (3, 2),
    "update_adam": (3, 4),
    "update_adamw": (3, 4),
}


def list_ops(session: Session, case: Case, rounds: int = 8) -> None:
    """Rows of ``samkern.ops``, on the backend that serves the device by default."""
    backend = session.backends[0] if session.backends else "reference"
    n_sets = session.sets_beyond_cache(case.bytes(2, 0))
    make = functools.partial(torch.randn, device=session.device, dtype=case.dtype)
    torch.manual_seed(0)
    sets = [Lists(case.shape_set, make) for _ in range(n_sets)]
    copies, copied = session.copies(case.bytes(5, 0))
    for name, (_, ours, plain, _) in PASSES.items():
        session.require(2)
        error = _check_pass(case, make, backend, ours, plain)
        with torch.no_grad(), samkern.use_backend(backend):
            runs = [functools.partial(ours, lists) for lists in sets]
            spent, copying = [], []
            for _ in range(rounds + 1):
                copying.append(session.clock.per_call(copies))
                spent.append(session.clock.per_call(runs))
        copy_gbps = copied / statistics.median(copying[1:]) / 1e9
        fields = {"measured": "pass", "method": name, "backend": backend, "mode": "plain", "cache": "cold"}
        session.add(case, spent[1:], case.bytes(*OPERANDS[name]), copy_gbps, max_err=error, **fields)


def _check_pass(case: Case, make: Any, backend: str, ours: Callable[[Lists], Any], plain: Any) -> float:
    """Everything that a pass can write, against the reference."""
    both = []
    for run, name in ((ours, backend), (plain, "reference")):
        torch.manual_seed(1)
        lists = Lists(case.shape_set, make)
        with torch.no_grad(), samkern.use_backend(name):
            run(lists)
        both.append([x for written in ("w", "saved", "m", "v", "step") for x in getattr(lists, written)])
    return check("pass", case, *both)
