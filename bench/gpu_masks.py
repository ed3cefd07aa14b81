"""What masks cost on a GPU: a masked perturbation beside a dense one, and an exact selection beside ``torch.topk``.

Inputs that together exceed the cache take turns. What is wrong is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samkern import BitMask, ops
from samkern.options import Climb, ClimbGroup, Report
from samkern.plan import Kept, make_plan

from .gpu_session import Case, Session, check

SERVED = ("cuda", "cpu")  # backends with kernels for masks
CLIMBS = [ClimbGroup(Climb.EUCLIDEAN, 1e-6)]


class MaskRig:
    """Parameters on gradients that stay where they are, a plan without a mask and one with a mask of half of the entries."""

    def __init__(self, case: Case, device: torch.device, backend: str) -> None:
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(x) for x in case.tensors(device)]
        self.g = case.tensors(device)
        self.report = torch.empty(len(Report), dtype=torch.float64, device=device)
        n = sum(x.numel() for x in self.g)
        self.mask = ops.random_mask(self.g, n // 2, backend=backend)
        self.plans: dict[str, Any] = {
            name: make_plan(backend, list(self.params), [0] * len(self.params), Kept(list(self.params)))
            for name in ("dense", "masked")
        }
        for i, bits in enumerate(self.mask.in_layout_of(self.params)):
            self.plans["masked"].bind_mask(i, bits)

    def feed(self) -> None:
        for p, grad in zip(self.params, self.g, strict=True):
            p.grad = grad

    def perturb(self, name: str) -> None:
        self.plans[name].perturb(CLIMBS, True, self.report)


def perturbations(session: Session, case: Case, backend: str, rounds: int) -> None:
    """Rows "perturb", dense and masked."""
    rigs = [MaskRig(case, session.device, name) for name in (backend, "reference")]
    for rig in rigs:
        with torch.no_grad():
            rig.feed()
            rig.perturb("masked")
    error = check("a masked perturbation", case, *(rig.params for rig in rigs))
    del rigs
    rigs = [MaskRig(case, session.device, backend) for _ in range(session.sets_beyond_cache(case.bytes(3, 0)))]
    spent: dict[str, list[float]] = {"dense": [], "masked": []}
    clock = session.clock
    for turn in range(rounds + 1):
        for name in ("dense", "masked") if turn % 2 else ("masked", "dense"):
            seen = []
            clock.synchronize()
            clock.lead(8.0)  # gradients are put in place in between
            for rig in rigs:
                rig.feed()
                begin = clock.now()
                rig.perturb(name)
                seen.append((begin, clock.now()))
                rig.plans[name].restore()
            clock.synchronize()
            spent[name].append(statistics.median(clock.between(*pair) for pair in seen))
    for name, seconds in spent.items():
        fields = {"measured": "perturb", "method": f"SAM {name}", "backend": backend, "mode": "plain"}
        session.add(case, seconds[1:], max_err=error, **fields)


def _flat(scores: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in scores])


def _check_selection(mask: BitMask, scores: list[Tensor], k: int) -> None:
    """``k`` ones, of which none is smaller than a zero."""
    chosen, flat = _flat(mask.unpack()), _flat(scores)
    assert int(chosen.sum()) == k, f"{int(chosen.sum())} entries are chosen instead of {k}: not timed"
    least, most = flat[chosen].min(), flat[~chosen].max()
    assert least >= most, f"{float(least)} is chosen and {float(most)} is not: not timed"


def selections(session: Session, case: Case, backend: str, rounds: int) -> None:
    """Rows of a selection of half of the entries, ours and torch's."""
    k = case.shape_set.n_params // 2
    n_sets = session.sets_beyond_cache(case.bytes(1, 0))
    sets = [case.tensors(session.device, torch.rand) for _ in range(n_sets)]
    _check_selection(ops.topk_mask(sets[0], k, backend=backend), sets[0], k)
    calls: dict[str, Callable[[list[Tensor]], Any]] = {
        backend: partial(ops.topk_mask, k=k, nan="last", backend=backend),
        "torch.topk": lambda scores: torch.topk(_flat(scores), k, sorted=False),
    }
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            runs = [partial(call, scores) for scores in (sets if name == backend else sets[:1])]
            spent[name].append(session.clock.per_call(runs))
    for name, seconds in spent.items():
        session.add(case, seconds[1:], measured="pass", method="topk_mask", backend=name, mode="plain")


def masks(session: Session, case: Case, rounds: int = 8) -> None:
    """Rows of what masks cost, on backends that have kernels for them."""
    for backend in session.backends:
        if backend in SERVED:
            session.require(4)
            perturbations(session, case, backend, rounds)
            selections(session, case, backend, rounds)
