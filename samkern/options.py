"""What the engine and a plan tell each other: plain values, with the names and numbers of ``csrc/plan.h``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Climb(IntEnum):
    """How a group is perturbed: ``eps = scale * direction``. The last two: along noise, by the norms of its own weights."""

    EUCLIDEAN, SIGN, ELEMENT, FILTER, LAYER, LARS, LAYER_SIGN, TRUST, NOISE_FILTER, NOISE_TENSOR = range(10)

    @property
    def along_gradient(self) -> bool:
        """Whether the direction is made from a gradient, or from what is in its place."""
        return self < Climb.NOISE_FILTER


class Mix(IntEnum):
    """What the base optimizer receives, ``u``, and what is kept. ``g`` is the gradient at ``w``, ``g_s`` at ``w + eps``.

    GRADIENT: ``u = `` the latest gradient. After a look, DECOMPOSE: ``u = g_s``, and ``c`` is its part orthogonal to ``g``.
    DIFFERENCE: the same with ``c = g_s - g``. BLEND: ``u = alpha g_s + (1 - alpha) g``. Without one, REUSE:
    ``u = g + alpha norm(g) / norm(c) c``. ADD: ``u = g + alpha c``.
    """

    GRADIENT, DECOMPOSE, REUSE, DIFFERENCE, ADD, BLEND = range(6)

    @property
    def fills_cache(self) -> bool:
        """Whether it writes ``c``, of the tensors that have a cache."""
        return self in (Mix.DECOMPOSE, Mix.DIFFERENCE)

    @property
    def adds_cache(self) -> bool:
        """Whether it reads ``c``."""
        return self in (Mix.REUSE, Mix.ADD)


class Scope(IntEnum):
    """What the dots and norms of a mix run over."""

    GLOBAL, TENSOR = range(2)


class Base(IntEnum):
    """Which update is fused. ``NONE``: ``u`` is handed over in ``p.grad``."""

    NONE, SGD, ADAM, ADAMW = range(4)


class Report(IntEnum):
    """Places in the report of a step: a float64 tensor on the parameters' device, read only when somebody asks."""

    GRAD_NORM, SECOND_NORM, UPDATE_NORM, PERTURB_NORM, REALISED_NORM, REALISED_SHARE, SKIPPED_FIRST, SKIPPED_SECOND = (
        range(8)
    )


def host_and_device(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A hyper-parameter as the kernels take it: a number, or a tensor on a GPU, which is never read here."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return math.nan, value
    return float(value), None


class ClimbGroup(NamedTuple):
    """How one param group is perturbed. ``rho = 0``: not at all. ``rho_on_device``, if given, wins over ``rho``."""

    climb: Climb
    rho: float
    eta: float = 0.0
    trust_clip: float = math.inf
    rho_on_device: Tensor | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """A row of a table. A ``rho`` that only the device knows is 0 there."""
        rho = self.rho if self.rho_on_device is None else 0.0
        return float(self.climb), rho, self.eta, self.trust_clip, float(self.perturbs)

    @property
    def perturbs(self) -> bool:
        """Whether the group is perturbed."""
        return self.rho_on_device is not None or self.rho > 0


class Noise(NamedTuple):
    """Which normal numbers perturb the weights: see ``reference_noise.normals``. ``rho`` of a group is their std."""

    seed: int
    t: int
    draw: int = 0


class AverageOptions(NamedTuple):
    """How an update takes its weights into their average: ``avg += k (w - avg)``, m of them being in it already.

    ``taken``: m, int64 of shape (1,) on their device, counted up unless the step is skipped. ``decay``: None for
    ``k = 1 / (m + 1)``, the mean of all; else ``k = 1 - decay``, of an exponential average, after the first (k = 1).
    ``warmup``: the decay is at most ``(1 + m) / (10 + m)``.
    """

    taken: Tensor
    decay: float | None = None
    warmup: bool = False


class MixOptions(NamedTuple):
    """What to feed the base. ``alpha``: see ``Mix``, one for each param group.

    ``weights``: of ADD, a factor on ``alpha`` for each parameter: float64, on their device. None: 1.
    """

    mix: Mix = Mix.GRADIENT
    scope: Scope = Scope.GLOBAL
    min_sine: float = 0.0
    alpha: Sequence[float] = ()
    weights: Tensor | None = None


class Scaling(NamedTuple):
    """A loss scale, as ``torch.amp.GradScaler`` keeps it: float32 tensors of one entry on the parameters' device.

    ``grad_scale``: gradients are so many times too large. ``found_inf``: if it is not 0, the step is skipped.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


UNSCALED = Scaling()


class BaseGroup(NamedTuple):
    """Options of a fused base update for one param group. ``lr_on_device``, if given, wins over ``lr``."""

    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    lr_on_device: Tensor | None = None

    @property
    def numbers(self) -> tuple[float, ...]:
        """A row of a table. An ``lr`` that only the device knows is 0 there."""
        return (
            self.lr if self.lr_on_device is None else 0.0,
            self.weight_decay,
            self.momentum,
            self.dampening,
            float(self.nesterov),
            self.beta1,
            self.beta2,
            self.eps,
        )


class Held(NamedTuple):
    """What a plan keeps in memory, beside what it was given.

    ``saved``: the weights as they were before a climb. ``first``: gradients that it has taken from the parameters.
    ``table_bytes``: of tables that are no tensors.
    """

    saved: Sequence[Tensor] = ()
    first: Sequence[Tensor] = ()
    other: Sequence[Tensor] = ()
    table_bytes: int = 0
