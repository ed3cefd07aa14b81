"""LoRA-SAM: SAM over the factors of adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..lora import Adapter, all_factors
from .around import name_in_groups
from .engine import SharpnessAware
from .flatlora import trained
from .perturbation import Euclidean


class LoRASAM(SharpnessAware):
    """SAM that climbs in the factors A and B of adapters only, with one norm over all of them.

    What else is trained (norms, heads) is updated and not perturbed: it comes in groups of its own with ``rho=0`` (``sam_rho``
    where the base has a ``rho``).

    Args:
        params_or_model: a model with LoRA layers, of ``peft`` or others (see ``samkern.lora``), of which all parameters that
            require a gradient are trained; or parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow, or a ready instance, of which a group has factors or other
            parameters, not both.
        rho: radius of the perturbation, in units of the factors, >= 0. May differ per group.
        adapters: a list of ``samkern.Adapter``, if not all of the model.
        model: the model, if ``params_or_model`` are parameters; then all that are no factors get ``rho=0``. Without it and
            ``adapters`` all parameters are taken for factors.
        options: further options of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs, and a saved copy of the factors.

    Raises:
        ValueError: an option is out of range; no adapters, or none of their factors is trained.

    Li, Zhang and He, NeurIPS 2024, https://arxiv.org/abs/2410.14802.

    >>> a, b, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 4), (3, 2), (3,)))
    >>> adapter = samkern.Adapter(torch.zeros(3, 4), a, b)
    >>> opt = samkern.LoRASAM([a, b, bias], torch.optim.SGD, lr=0.1, adapters=[adapter])
    >>> [(len(group["params"]), group["rho"]) for group in opt.param_groups]
    [(2, 0.05), (1, 0.0)]
    """

    def __init__(
        self,
        params_or_model: Any,
        base: Any,
        rho: float = 0.05,
        *,
        adapters: Sequence[Adapter] | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        params, model = trained(params_or_model, base, model)
        factors: set[Tensor] | None = None
        if adapters is not None or model is not None:
            found: Iterable[Any] = all_factors(model) if adapters is None and model is not None else adapters or ()
            factors = {p for f in found for p in (f.a, f.b)}
            if isinstance(base, Optimizer):
                _quieten(base, factors, name_in_groups("rho", base.defaults))
            else:
                params = _parted(
                    params, factors, name_in_groups("rho", inspect.signature(base).parameters if callable(base) else ())
                )
        super().__init__(params, base, perturbation=Euclidean(rho), model=model, **options)
        self._factors = factors  # None: all parameters are

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Without factors, and without a ``rho`` of its own, the group is not perturbed."""
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        if self._factors is not None and not any(_tensor(p) in self._factors for p in members):
            param_group.setdefault(self.key("rho"), 0.0)
        super().add_param_group({**param_group, "params": members})


def _parted(params: Any, factors: set[Tensor], radius: str) -> list[dict[str, Any]]:
    """Groups of factors, and groups with ``radius`` 0 of what else is there, in this order."""
    given: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    parted, others = [], []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        ours = [p for p in members if _tensor(p) in factors]
        rest = [p for p in members if _tensor(p) not in factors]
        parted += [{**group, "params": ours}] if ours else []
        others += [{**group, "params": rest, radius: 0.0}] if rest else []
    if not parted:
        _refuse()
    return parted + others


def _quieten(base: Optimizer, factors: set[Tensor], radius: str) -> None:
    """Sets ``radius`` to 0 for the groups of ``base`` that have no factors."""
    shares = [[p in factors for p in group["params"]] for group in base.param_groups]
    if not any(map(any, shares)):
        _refuse()
    for i, share in enumerate(shares):
        if any(share) and not all(share):
            raise ValueError(f"group {i} of the base has factors and other parameters: make two groups of them")
    for group, share in zip(base.param_groups, shares, strict=True):
        if not any(share):
            group[radius] = 0.0


def _refuse() -> None:
    raise ValueError("no factor of an adapter is among the parameters: pass those of lora_A and lora_B, or the model")


def _tensor(p: Tensor | tuple[str, Tensor]) -> Tensor:
    """Of a parameter that may come with its name."""
    return p[1] if isinstance(p, tuple) else p
