"""BASE: which torch.optim updates run inside the fused pass, and why others run their own ``step``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..options import Base, BaseGroup, host_and_device
from ..reference import math_dtype
from ..shards import spread_as


@dataclass(frozen=True)
class FusedRule:
    """A base update that the kernels do, with torch's semantics and torch's names for its state.

    ``keys``: the first moment, the second moment, the step count, as far as there are any.
    """

    base: Base
    keys: tuple[str, ...]
    group: Callable[[Mapping[str, Any]], BaseGroup]

    def needs_state(self, group: Mapping[str, Any]) -> bool:
        """Whether the parameters of ``group`` have state at all."""
        return self.base != Base.SGD or group["momentum"] != 0

    def create(self, p: Tensor) -> dict[str, Tensor]:
        """State of a parameter before its first update."""
        moments = {key: torch.zeros_like(p, dtype=math_dtype(p.dtype), requires_grad=False) for key in self.keys[:2]}
        if self.base == Base.SGD:
            return moments
        # As torch counts: in a half type, which may be the default, the count would stop at 256 or 2048.
        counts = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return {"step": torch.zeros((), dtype=counts, device=p.device), **moments}

    def adopt(self, p: Tensor, state: dict[str, Any]) -> None:
        """Brings state that torch or a checkpoint left to the dtype and layout that the kernels write."""
        for key in self.keys:
            value = state.get(key)
            if value is None:
                state.pop(key, None)
            elif key == "step":
                state[key] = torch.as_tensor(value, device=p.device)
            else:
                state[key] = fitted(value, p, math_dtype(p.dtype))


def fitted(value: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype`` and in the memory layout of ``p``, itself if it is so already."""
    value = spread_as(value, p)
    if value.dtype == dtype and value.device == p.device and value.stride() == p.stride():
        return value
    return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)


def _sgd_group(group: Mapping[str, Any]) -> BaseGroup:
    lr, on_device = host_and_device(group["lr"])
    return BaseGroup(
        lr,
        float(group["weight_decay"]),
        float(group["momentum"]),
        float(group["dampening"]),
        bool(group["nesterov"]),
        lr_on_device=on_device,
    )


def _adam_group(group: Mapping[str, Any]) -> BaseGroup:
    beta1, beta2 = group["betas"]
    lr, on_device = host_and_device(group["lr"])
    return BaseGroup(
        lr,
        float(group["weight_decay"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        lr_on_device=on_device,
    )


_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_RULES = {
    SGD: FusedRule(Base.SGD, ("momentum_buffer",), _sgd_group),
    Adam: FusedRule(Base.ADAM, _MOMENTS, _adam_group),
    AdamW: FusedRule(Base.ADAMW, _MOMENTS, _adam_group),
}


def fused_rule(base: Optimizer) -> tuple[FusedRule | None, str]:
    """The fused update that equals ``base.step()``, or None and why there is none. All groups step together."""
    name = type(base).__name__
    rule = _RULES.get(type(base))
    if rule is None:
        return None, f"{name} has no fused update"
    for i, group in enumerate(base.param_groups):
        for option in ("amsgrad", "differentiable", "capturable"):
            if group.get(option):
                return None, f"group {i} has {option}=True, which the fused {name} does not cover"
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None, f"hooks on the step of {name} must run"
    if rule.base == Base.ADAM and any(group.get("decoupled_weight_decay") for group in base.param_groups):
        if not all(group.get("decoupled_weight_decay") for group in base.param_groups):
            return None, "only some groups have decoupled_weight_decay"
        rule = _RULES[AdamW]
    return rule, f"fused {name}"


def make_base(params: Any, base: Any, options: dict[str, Any]) -> Optimizer:
    """The base optimizer: an instance as it is, a class (or any callable) called with ``params`` and ``options``.

    Raises:
        TypeError: ``base`` is neither, or options came with an instance.
        ValueError: ``params`` are not those of the instance, or the base cannot serve (``maximize``, LBFGS).
    """
    if isinstance(base, Optimizer):
        if options:
            raise TypeError(
                f"options {sorted(options)} came with a ready {type(base).__name__}; set them on that instance"
            )
        _check_same(params, base)
    elif callable(base):
        base = base(params, **options)
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must make a torch.optim.Optimizer, got {type(base).__name__}")
    else:
        raise TypeError(f"base must be a torch.optim class or instance, got {base!r}")
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError(
            "base LBFGS evaluates the closure itself; use a base whose step() needs none, such as SGD or AdamW"
        )
    for i, group in enumerate(base.param_groups):
        if group.get("maximize"):
            raise ValueError(
                f"maximize=True (group {i}) would flip the worst-case direction; minimize the negated loss"
            )
    return base


def _check_same(params: Any, base: Optimizer) -> None:
    if params is None:
        return
    given: list[Tensor] = []
    for entry in [params] if isinstance(params, Tensor) else params:
        members = entry["params"] if isinstance(entry, dict) else [entry]
        given += [members] if isinstance(members, Tensor) else [m[1] if isinstance(m, tuple) else m for m in members]
    held = {id(p) for group in base.param_groups for p in group["params"]}
    if {id(p) for p in given} != held:
        raise ValueError(f"params are not those of the given {type(base).__name__}; pass the same ones, or None")
