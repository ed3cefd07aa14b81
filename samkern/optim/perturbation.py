"""WHERE the second gradient is taken: how a param group is perturbed. One class for each formula of ``eps``.

Every option is a key of the param groups, so that a group may override it; ``rho = 0`` leaves a group unperturbed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ..options import Climb, ClimbGroup, Noise, host_and_device
from .checks import at_least, at_least_int, one_of


class Perturbation(ABC):
    """How weights climb before the second pass.

    ``options`` are the defaults of its keys in the param groups.
    """

    radius = "rho"  # the option that is 0 for a group that is not perturbed
    before_pass = False  # climbs before the only pass of a step, not between two
    along_momentum = False  # of the base, which must have one
    of_parameters = True  # moves those of the optimizer
    takes_parts = True  # a step may have several closures, each with a perturbation of its own
    draws = 1  # how often a step calls its only closure, if it climbs before its pass

    def __init__(self, rho: float, **options: Any) -> None:
        self.options: dict[str, Any] = {"rho": rho, **options}
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if an option of a group is out of range."""
        at_least("rho", group["rho"], 0)

    @abstractmethod
    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        """What the kernels do to the parameters of ``group``."""

    def climb_at(self, t: int, group: Mapping[str, Any]) -> ClimbGroup:
        """The same in step ``t``, counted from 0."""
        return self.climb(group)

    def noise(self, t: int, draw: int) -> Noise | None:
        """Along which noise the parameters climb in step ``t``; None: along a gradient or a momentum."""
        return None

    def enter(  # noqa: B027 - most have nothing to do
        self, t: int, draw: int, groups: Sequence[Mapping[str, Any]], until_done: ExitStack
    ) -> None:
        """Perturbs what is no parameter of the optimizer, until ``until_done`` is closed.

        ``groups``: our options of each group, with its parameters ("params").
        """

    def explain(self, group: Mapping[str, Any]) -> str:
        """How ``group`` is perturbed, if ``climb()`` does not tell."""
        return ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs of it."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """Takes ``state()`` back."""

    def held(self) -> Sequence[Tensor]:
        """What it keeps in memory between steps."""
        return ()

    def extra_bytes(self) -> int:
        """What of that is not there before the first step, and will be."""
        return 0

    @property
    def survives_half_precision(self) -> bool:
        """Whether ``eps`` is scaled by the weights themselves, so that it does not vanish below their last place."""
        return False


class Euclidean(Perturbation):
    """SAM: ``eps = rho g / norm(g)``; with ``p = inf``, ``eps = rho sign(g)``.

    Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, eq. 2.

    >>> samkern.optim.Euclidean(0.05).options
    {'rho': 0.05, 'p': 2}
    """

    def __init__(self, rho: float = 0.05, p: float = 2) -> None:
        super().__init__(rho, p=p)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        one_of("p", group["p"], (2, math.inf))

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        rho, on_device = host_and_device(group["rho"])
        return ClimbGroup(Climb.EUCLIDEAN if group["p"] == 2 else Climb.SIGN, rho, rho_on_device=on_device)


class Adaptive(Perturbation):
    """ASAM: ``eps = rho T^2 g / norm(T g)``, so that ``norm(T^-1 eps) = rho``; it follows weights that are rescaled.

    Args:
        rho: radius, in units of T, >= 0.
        mode: T is ``|w| + eta`` ("element"), ``norm(w_f) + eta`` of each dim-0 slice ("filter") or ``norm(w_i) + eta`` of
            each tensor ("layer"). In a tensor of one dimension every entry is a filter.
        eta: added to T, >= 0; with 0, a zero weight is never perturbed.

    A group with ``adaptive=False`` has T = 1.

    Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, eq. 4.

    >>> samkern.optim.Adaptive(0.5, "filter").options["eta"]
    0.01
    """

    _CLIMBS = {"element": Climb.ELEMENT, "filter": Climb.FILTER, "layer": Climb.LAYER}

    def __init__(self, rho: float = 0.5, mode: str = "element", eta: float = 0.01) -> None:
        super().__init__(rho, mode=mode, eta=eta, adaptive=True)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        one_of("mode", group["mode"], tuple(self._CLIMBS))
        at_least("eta", group["eta"], 0)

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        kind = self._CLIMBS[group["mode"]] if group["adaptive"] else Climb.EUCLIDEAN
        rho, on_device = host_and_device(group["rho"])
        return ClimbGroup(kind, rho, group["eta"], rho_on_device=on_device)


class Elementwise(Adaptive):
    """``Adaptive`` with ``T = |w| + eta``.

    >>> samkern.optim.Elementwise(0.5).options["mode"]
    'element'
    """

    def __init__(self, rho: float = 0.5, eta: float = 0.01) -> None:
        super().__init__(rho, "element", eta)


class Filterwise(Adaptive):
    """``Adaptive`` with ``T = norm(w_f) + eta`` for every dim-0 slice.

    >>> samkern.optim.Filterwise(0.5).options["mode"]
    'filter'
    """

    def __init__(self, rho: float = 0.5, eta: float = 0.01) -> None:
        super().__init__(rho, "filter", eta)


class Layerwise(Perturbation):
    """Look-LayerSAM's climbs, scaled by the norms of each tensor's weights and gradient.

    Args:
        rho: radius, in units of the norm of a tensor's weights, >= 0.
        layer_mode: "lars": ``rho norm(w_i) g_i / norm(g_i)``, whatever the scale of the loss. "sign":
            ``rho norm(w_i) / norm(g_i) sign(g_i)``, which grows as g shrinks. "trust":
            ``rho min(norm(w_i) / norm(g_i), trust_clip) g_i / norm(g)``.
        trust_clip: upper bound of the ratio in "trust", > 0.

    Liu et al., CVPR 2022, https://arxiv.org/abs/2203.02714.

    >>> samkern.optim.Layerwise(0.05).options["layer_mode"]
    'lars'
    """

    _CLIMBS = {"lars": Climb.LARS, "sign": Climb.LAYER_SIGN, "trust": Climb.TRUST}

    def __init__(self, rho: float = 0.05, layer_mode: str = "lars", trust_clip: float = 20.0) -> None:
        super().__init__(rho, layer_mode=layer_mode, trust_clip=trust_clip)

    def check(self, group: Mapping[str, Any]) -> None:
        super().check(group)
        one_of("layer_mode", group["layer_mode"], tuple(self._CLIMBS))
        at_least("trust_clip", group["trust_clip"], 0, strictly=True)

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        rho, on_device = host_and_device(group["rho"])
        return ClimbGroup(self._CLIMBS[group["layer_mode"]], rho, 0.0, group["trust_clip"], on_device)

    @property
    def survives_half_precision(self) -> bool:
        return True


class Momentum(Perturbation):
    """MSAM: ``eps = -rho v / norm(v)``, v the momentum of the base, so that one pass is enough: it is taken at ``w + eps``.

    Minus, because ``-v`` is where the weights move next. The base must be SGD with momentum, Adam or AdamW with a fused
    update. Before the first update v is zero, and so is ``eps``.

    Args:
        how: how the climb follows v, as another perturbation follows a gradient; None: ``Euclidean(1.0)``. Its radius is
            about 15 times SAM's.

    Becker et al. 2024, https://arxiv.org/abs/2401.12033.

    >>> samkern.optim.Momentum(samkern.optim.Filterwise(2.0)).options["rho"]
    2.0
    """

    before_pass = True
    along_momentum = True
    takes_parts = False

    def __init__(self, how: Perturbation | None = None) -> None:
        self._how = how or Euclidean(1.0)
        if self._how.before_pass:
            raise ValueError("how must follow gradients, such as Euclidean or Filterwise, got a Momentum")
        self.options = self._how.options

    def check(self, group: Mapping[str, Any]) -> None:
        self._how.check(group)

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        return self._how.climb(group)

    @property
    def survives_half_precision(self) -> bool:
        return self._how.survives_half_precision


class SeededNoise(Perturbation):
    """What noise has in common: a seed, of which a checkpoint takes its own along."""

    before_pass = True

    def __init__(self, draws: int, seed: int) -> None:
        at_least_int("draws", draws, 1)
        at_least_int("seed", seed, 0)
        self.draws, self.seed = draws, seed

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seed = state.get("seed", self.seed)

    @property
    def survives_half_precision(self) -> bool:
        return True


class Gaussian(SeededNoise):
    """LPF-SGD: the only gradient of a step is taken at ``w + tau``, tau normal with a standard deviation of ``std_t n``.

    ``std_t = std (1 + (inc - 1) (1 - cos(pi s)) / 2)`` with the progress ``s = min(t / total_steps, 1)`` grows from ``std`` to
    ``inc std``.

    Args:
        std: of the noise where n = 1, >= 0; may differ per group, and 0 leaves a group unperturbed.
        inc: growth of it over the training, >= 0; 1: none.
        draws: how many times a step calls a single closure, each time with another noise, to take the mean of the gradients.
            Of several closures, each has one.
        total_steps: for ``inc != 1``, >= 1. Later steps have s = 1.
        scale: n is the norm of each dim-0 slice, of a tensor of fewer than two dimensions as a whole ("filter"), or of each
            tensor ("tensor").
        seed: >= 0; that of a checkpoint wins. The noise is of Philox words of seed, step, draw and place of an entry: the same
            on every backend and rank, and after a resume, and torch's global generators are left alone. It is never stored.

    Bisla et al., AISTATS 2022, https://arxiv.org/abs/2201.08025.

    >>> samkern.optim.Gaussian(5e-4, inc=15, total_steps=100).options
    {'std': 0.0005, 'inc': 15, 'scale': 'filter'}
    """

    radius = "std"
    _CLIMBS = {"filter": Climb.NOISE_FILTER, "tensor": Climb.NOISE_TENSOR}

    def __init__(
        self,
        std: float = 5e-4,
        inc: float = 1.0,
        draws: int = 1,
        total_steps: int | None = None,
        scale: str = "filter",
        seed: int = 0,
    ) -> None:
        super().__init__(draws, seed)
        if total_steps is not None or inc != 1:
            at_least_int("total_steps", total_steps, 1)  # type: ignore[arg-type]
        self.total_steps = total_steps
        self.options = {"std": std, "inc": inc, "scale": scale}
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        at_least("std", group["std"], 0)
        at_least("inc", group["inc"], 0)
        one_of("scale", group["scale"], tuple(self._CLIMBS))
        if group["inc"] != 1 and self.total_steps is None:
            raise ValueError(f"inc={group['inc']!r} lets the noise grow with the training: pass total_steps=")

    def climb(self, group: Mapping[str, Any]) -> ClimbGroup:
        return ClimbGroup(self._CLIMBS[group["scale"]], float(group["std"]))

    def climb_at(self, t: int, group: Mapping[str, Any]) -> ClimbGroup:
        s = min(t / self.total_steps, 1.0) if self.total_steps else 0.0
        growth = 1 + (group["inc"] - 1) * (1 - math.cos(math.pi * s)) / 2
        return ClimbGroup(self._CLIMBS[group["scale"]], float(group["std"]) * growth)

    def noise(self, t: int, draw: int) -> Noise:
        return Noise(self.seed, t, draw)
