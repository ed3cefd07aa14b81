"""Random configurations: what one is, and how it is drawn, by hypothesis or by a plain random generator.

A case is a list of weights in groups, a method on a base, and what happens to them: steps, some of which go wrong, checkpoints,
copies, changes. Numbers (weights, gradients, losses) follow from its seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import samkern

from .lists import BF16, FP16, FP32, FP64
from .methods import METHODS, Base, Method, OwnStepSGD, base_named
from .oracles import arsam, bases, lets, looksam, msam, sam, schedules, ssam

Choose = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Subject:
    """A method. ``varied``: options to choose from. ``of_groups``: those that a group may set. ``calls``: kinds of steps."""

    method: Method
    varied: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    of_groups: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    calls: tuple[str, ...] = ("closure", "halves")


PARTS = ("closure", "halves", "parts")
VARIED = {
    samkern.SAM: ({}, {}, PARTS),
    samkern.SAMk: ({"k": (1, 2, 3)}, {}, PARTS),
    samkern.ASAM: ({}, {"eta": (0.0, 0.3), "adaptive": (False,)}, PARTS),
    samkern.LookSAM: ({"k": (1, 2, 3)}, {"alpha": (0.0, 1.3)}),
    samkern.LookLayerSAM: ({"k": (1, 2, 3)}, {"alpha": (0.0, 1.3)}),
    samkern.SSAMF: ({"sparsity": (0.0, 0.5, 1.0), "renormalise": (False, True)}, {"masked": (False,)}),
    samkern.SSAMD: ({"regrow": (False, True), "refresh_interval": (1, 3)}, {"masked": (False,)}),
    samkern.GRST: ({"p": (0.5, 1.0), "gamma": (0.5, 2.0, "match")}, {"gamma": (0.0, 1.5)}, PARTS),
    samkern.ARSAM: ({"components": (None, "tensor"), "warmup_steps": (0, 2), "seed": (0, 1)}, {"beta": (0.0, 1.0)}),
}
SCHEDULES = ("constant", "piecewise-1", "piecewise-2", "linear-up", "cosine-down")
BY_NORM = {"rho": 0.1, "total_steps": 6}
LEARNED = {"rho": 0.1, "beta": 1e-3}
LETS_VARIED = ({"period": (1, 2, 3)}, {}, ("validation",))
SUBJECTS = [
    *(Subject(method, *VARIED[method.cls]) for method in METHODS),
    Subject(
        Method("RST", samkern.RST, schedules.RST, {"rho": 0.1, "total_steps": 6}),
        {"schedule": SCHEDULES, "seed": (0, 1)},
        calls=PARTS,
    ),
    Subject(Method("AESAM", samkern.AESAM, schedules.AESAM, BY_NORM)),
    Subject(
        Method("AELookSAM", samkern.AELookSAM, schedules.AELookSAM, BY_NORM),
        {"rule": ("R1", "R2", "R3"), "k": (1, 2)},
        {"alpha": (0.0, 1.3)},
    ),
    Subject(Method("MSAM", samkern.MSAM, msam.MSAM, {"rho": 0.5}), calls=("closure", "perturbed")),
    Subject(Method("LETSSAM", samkern.LETSSAM, lets.LETSSAM, LEARNED), *LETS_VARIED),
    Subject(Method("LETSASAM", samkern.LETSASAM, lets.LETSASAM, LEARNED), *LETS_VARIED),
]
# The oracles that take lists of closures.
MICRO = {
    sam.SAM: msam.MicroSAM,
    sam.SAMk: msam.MicroSAMk,
    sam.ASAM: msam.MicroASAM,
    schedules.RST: msam.MicroRST,
    schedules.GRST: msam.MicroGRST,
}


def with_eps(name: str, **options: Any) -> Base:
    """With an ``eps`` that is no smaller than gradients: no rounding is divided by numbers of its own size."""
    base = base_named(name)
    return replace(base, options={**base.options, "eps": 0.1, **options})


FUSED = [
    *map(base_named, ("SGD", "momentum", "Nesterov")),
    with_eps("Adam"),
    with_eps("AdamW"),
]
FOREIGN = [
    Base(cls.__name__, cls, partial(bases.Foreign, cls), options)
    for cls, options in [
        (OwnStepSGD, base_named("own_step").options),
        (torch.optim.RMSprop, {"lr": 0.01, "eps": 0.1, "momentum": 0.5}),
        (torch.optim.Adadelta, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.05, "eps": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "eps": 0.1, "amsgrad": True}),
    ]
]
SHAPES = {
    **{str(shape): shape for shape in ((), (1,), (7,), (0,), (3, 0), (4, 3), (33, 5), (2, 3, 2))},
    "transposed": (4, 5),
    "channels_last": (2, 3, 4, 2),
    "with gaps": (3, 4),
}
USUAL = ["(7,)", "(4, 3)", "(2, 3, 2)"]
ERRORS = {"RuntimeError": RuntimeError, "KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit}


@dataclass(frozen=True)
class Weight:
    """``group``: its number. Some groups may have no weights."""

    shape: str
    dtype: torch.dtype
    group: int
    frozen: bool = False


@dataclass(frozen=True)
class Step:
    """Passes are counted over all closures of the step, those that are not taken too.

    ``missing``: by pass, the weights without a gradient. ``zero``: weights whose first gradient is zero. ``bad``: a pass and
    the value that is in one of its gradients. ``fails``: a pass and the name of what it raises.
    """

    call: str = "closure"
    missing: tuple[tuple[int, ...], ...] = ()
    zero: tuple[int, ...] = ()
    bad: tuple[int, float] | None = None
    fails: tuple[int, str] | None = None


@dataclass(frozen=True)
class Change:
    """What happens between two steps. ``group``: to the parameters of which one; or its options, of one that is added."""

    what: str
    group: Any = None
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True)
class Case:
    seed: int
    subject: str
    options: dict[str, Any]
    base: Base
    weights: tuple[Weight, ...]
    groups: tuple[dict[str, Any], ...]
    events: tuple[Step | Change, ...]


def subject_named(name: str) -> Subject:
    return next(subject for subject in SUBJECTS if subject.method.name == name)


def draw_case(choose: Choose) -> Case:
    """``choose(options)`` returns one of them; the first is the simplest."""
    subject = choose(SUBJECTS)
    name = subject.method.name
    base = choose(_bases_of(name))
    n_groups = choose([1, 1, 2, 3])
    dtypes = choose([[FP32], [FP64], [BF16], [FP16], [FP32, BF16], [FP32, FP64, BF16, FP16]])
    weights = _weights(choose, choose([1, 2, 3, 4, 6]), n_groups, dtypes)
    options = {key: choose(values) for key, values in subject.varied.items()}
    options["max_grad_norm"] = choose([None, None, 0.5])
    # A step of torch's own cannot be told by a flag to do nothing, and "ignore" leaves out that it is read.
    options["nonfinite"] = "skip" if base in FOREIGN else choose(["skip", "skip", "ignore"])
    if looks_back(subject):
        options["cache_dtype"] = choose([FP32, FP32, BF16])
    groups = tuple(_group(choose, subject, base) for _ in range(n_groups))
    if name.startswith("LETS"):  # there must be a radius to learn, and it is one for all
        groups = tuple({**g, "rho": 0.0} if g.get("rho") == 0 and i != weights[0].group else _without(g, "rho")
                       for i, g in enumerate(groups))  # fmt: skip
    events, n = [], len(weights)
    for _ in range(choose([3, 5, 8])):
        event = _event(choose, subject, base, n, n_groups, dtypes)
        if isinstance(event, Change) and event.what == "group":
            n, n_groups = n + len(event.weights), n_groups + 1
        events.append(event)
    return Case(choose(range(10_000)), name, options, base, weights, groups, tuple(events))


def looks_back(subject: Subject) -> bool:
    """Whether it keeps something from a look."""
    return issubclass(subject.method.oracle, (looksam.LookSAM, arsam.Difference))


def is_masked(subject: Subject) -> bool:
    return issubclass(subject.method.oracle, ssam.SSAM)


def _bases_of(name: str) -> list[Base]:
    return FUSED[1:] if name == "MSAM" else FUSED + FOREIGN


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != name}


def _weights(choose: Choose, n: int, n_groups: int, dtypes: list[torch.dtype], first: int = 0) -> tuple[Weight, ...]:
    places = sorted(first + choose(range(n_groups)) for _ in range(n))
    shapes = [*USUAL * 2, *SHAPES]
    return tuple(Weight(choose(shapes), choose(dtypes), group, choose([False] * 7 + [True])) for group in places)


def _group(choose: Choose, subject: Subject, base: Base) -> dict[str, Any]:
    """Options of a group, a few of those that it may have."""
    rho = subject.method.options["rho"]
    possible = {"rho": (0.0, 2 * rho), "lr": (base.options["lr"] / 2,), **subject.of_groups}
    if "weight_decay" in base.options:
        possible["weight_decay"] = (0.0, 0.05)
    return {name: value for name, values in possible.items() if (value := choose([None, None, *values])) is not None}


def _event(
    choose: Choose, subject: Subject, base: Base, n: int, n_groups: int, dtypes: list[torch.dtype]
) -> Step | Change:
    what = choose(["step"] * 5 + ["fails", "fails", "bad", "bad"] + ["change"] * 3)
    if what == "change":
        kind = choose(["file", "deepcopy", "pickle", "lr", "rho", "restore", "group"])
        if kind == "group":
            options = _group(choose, subject, base)
            if subject.method.name.startswith("LETS"):
                options = _without(options, "rho")
            return Change(kind, options, _weights(choose, choose([1, 2]), 1, dtypes, n_groups))
        return Change(kind, choose(range(n_groups)) if kind in ("lr", "rho") else None)
    call = choose(subject.calls)
    n_passes = 4 if call in ("parts", "validation") else 2
    missing = tuple(_some(choose, n) for _ in range(n_passes))
    step = Step(call, missing, _some(choose, n))
    if what == "bad":
        return replace(step, bad=(choose(range(n_passes)), choose([math.nan, math.inf, -math.inf])))
    if what == "fails":
        return replace(step, fails=(choose(range(n_passes)), choose(list(ERRORS))))
    return step


def _some(choose: Choose, n: int) -> tuple[int, ...]:
    """None of n, or all, or a few."""
    how = choose(["none"] * 6 + ["few", "few", "all"])
    return tuple(range(n)) if how == "all" else (choose(range(n)),) if how == "few" else ()
