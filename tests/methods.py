"""Every method once, with its oracle: the list that all tests of methods go through. Bases likewise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import samkern

from .oracles import arsam, bases, looksam, sam, schedules, ssam


@dataclass(frozen=True)
class Method:
    name: str
    cls: type[samkern.SharpnessAware]
    oracle: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    looks_every: int = 1
    caches: bool = False

    def make(self, params: Any, base: Base, **options: Any) -> samkern.SharpnessAware:
        return self.cls(params, base.cls, **{**base.options, **self.options, **options})

    def make_oracle(self, w: list[torch.Tensor], base: Base, **options: Any) -> Any:
        return self.oracle(w, base.oracle(w, **base.options), **{**self.options, **options})


@dataclass(frozen=True)
class Base:
    name: str
    cls: type[torch.optim.Optimizer]
    oracle: Callable[..., Any]
    options: dict[str, Any]


class OwnStepSGD(torch.optim.SGD):
    """A base that samkern does not know: it must run its own ``step``."""


# Windows of three steps with one look, which this seed puts on the first step of the first seven.
ONE_OF_THREE = {"window": 3, "max_rate": 1 / 3, "warmup_steps": 0, "seed": 2442}
MASKED = {"rho": 0.1, "sparsity": 0.4, "refresh_interval": 3}
METHODS = [
    Method("SAM", samkern.SAM, sam.SAM, {"rho": 0.1}),
    Method("SAM_inf", samkern.SAM, sam.SAM, {"rho": 0.01, "p": math.inf}),
    Method("SAMk", samkern.SAMk, sam.SAMk, {"rho": 0.1, "k": 3}, looks_every=3),
    Method("ASAM_element", samkern.ASAM, sam.ASAM, {"rho": 0.5, "mode": "element"}),
    Method("ASAM_filter", samkern.ASAM, sam.ASAM, {"rho": 0.5, "mode": "filter"}),
    Method("ASAM_layer", samkern.ASAM, sam.ASAM, {"rho": 0.5, "mode": "layer", "eta": 0.1}),
    Method("LookSAM", samkern.LookSAM, looksam.LookSAM, {"rho": 0.1, "k": 3}, looks_every=3, caches=True),
    Method(
        "LookSAM_tensor",
        samkern.LookSAM,
        looksam.LookSAM,
        {"rho": 0.1, "k": 2, "scope": "tensor"},
        looks_every=2,
        caches=True,
    ),
    *(
        Method(
            f"LookLayerSAM_{mode}",
            samkern.LookLayerSAM,
            looksam.LookLayerSAM,
            {"rho": 0.01, "k": 3, "layer_mode": mode, "trust_clip": 5.0},
            looks_every=3,
            caches=True,
        )
        for mode in ("lars", "sign", "trust")
    ),
    Method("SSAMF_batch", samkern.SSAMF, ssam.SSAMF, {"fisher": "batch", "fisher_every": 2, **MASKED}),
    Method("SSAMD", samkern.SSAMD, ssam.SSAMD, {"total_steps": 12, "regrow": False, "renormalise": True, **MASKED}),
    Method("GRST", samkern.GRST, schedules.GRST, {"rho": 0.1, "p": 1.0, "gamma": 2.0}),
    Method("ARSAM", samkern.ARSAM, arsam.ARSAM, {"rho": 0.1, **ONE_OF_THREE}, looks_every=3, caches=True),
]
BASES = [
    Base("SGD", torch.optim.SGD, bases.Sgd, {"lr": 0.1}),
    Base("momentum", torch.optim.SGD, bases.Sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 1e-2}),
    Base("Nesterov", torch.optim.SGD, bases.Sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    Base("Adam", torch.optim.Adam, bases.Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    Base("AdamW", torch.optim.AdamW, bases.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    Base("own_step", OwnStepSGD, bases.Sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
]

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
SAM, MOMENTUM = METHODS[0], BASES[1]


def method_named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def base_named(name: str) -> Base:
    return next(base for base in BASES if base.name == name)
