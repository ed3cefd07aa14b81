"""How far the loss rises within a radius, by climbing with the passes of the optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..optim.checks import at_least, at_least_int, one_of
from ..progress import progress_bar
from ..reference import finite, math_dtype
from .measurement import Measurement
from .problem import Batch, LossFn, Problem, problem

MODES = ("element", "filter", "layer")


def epsilon_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    rho: float = 0.05,
    steps: int = 1,
    relative: bool = False,
    step_size: float | None = None,
    random_start: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The rise ``max L(w + e) - L(w)`` of the mean loss over ``norm(e) <= rho``, as far as a climb finds it.

    Projected gradient ascent: a step goes ``step_size`` along the normalised gradient and back into the ball. The highest
    point that was visited counts, ``w`` itself apart: a value below 0 says that the loss falls where the gradient says that
    it rises, so ``rho`` is too large for one step. Costs ``steps`` forward-backward pairs over the data and a forward; memory
    for two copies of the weights and two of the gradient.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        rho: radius, in units of the weights, >= 0.
        steps: >= 1. One goes where SAM's perturbation goes.
        relative: divides by ``1 + L(w)``.
        step_size: > 0; None: ``rho``, so that the first step is SAM's, and more steps never find less.
        random_start: begins on the sphere of radius ``rho``, in a direction drawn from ``seed``; needed where the
            gradient is 0. Its point counts too.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of the loss; standard error and parts over the batches. NaN where the loss is NaN or its gradient is
        not finite on the way.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Keskar et al. 2017 (arXiv 1609.04836), metric 2.1; Foret et al. 2021 (arXiv 2010.01412), eq. 2.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # the loss is 3 w_0 for this x
    >>> data = [(torch.tensor([[3.0, 0.0]]), None)]
    >>> round(samkern.sharpness.epsilon_sharpness(model, lambda out, _: out.mean(), data, rho=0.1).value, 4)
    0.3
    """
    climb = Climb(rho, steps, step_size, random_start)
    with problem(model, loss_fn, data, seed) as p:
        return _rise(p, climb, [p.batches], relative, progress)


def adaptive_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    rho: float = 0.5,
    mode: str = "element",
    eta: float = 0.0,
    steps: int = 1,
    relative: bool = False,
    step_size: float | None = None,
    random_start: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The same over ``norm(T^-1 e) <= rho``, T the size of the weights: rescaling layers against each other changes nothing.

    Steps go along ``T^2 g / norm(T g)``.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        rho: radius, in multiples of the weights, >= 0.
        mode: T is ``|w| + eta`` ("element"), ``norm(w_f) + eta`` for each dim-0 slice ("filter") or ``norm(w_i) + eta``
            for each tensor ("layer").
        eta: >= 0; only 0 is exactly invariant, and then what is 0 stays 0.
        steps, relative, step_size, random_start, progress: see ``epsilon_sharpness``.

    Returns:
        In units of the loss; standard error and parts over the batches.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Kwon et al. 2021 (arXiv 2102.11600).

    >>> model = torch.nn.Linear(2, 1, bias=False)  # the loss is 3 w_0, w_0 is 2
    >>> model.weight.data = torch.tensor([[2.0, 1.0]])
    >>> data = [(torch.tensor([[3.0, 0.0]]), None)]
    >>> round(samkern.sharpness.adaptive_sharpness(model, lambda out, _: out.mean(), data, rho=0.1).value, 4)
    0.6
    """
    one_of("mode", mode, MODES)
    at_least("eta", eta, 0)
    climb = Climb(rho, steps, step_size, random_start, mode, eta)
    with problem(model, loss_fn, data, seed) as p:
        return _rise(p, climb, [p.batches], relative, progress)


def m_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    m: int,
    rho: float = 0.05,
    steps: int = 1,
    relative: bool = False,
    step_size: float | None = None,
    random_start: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The mean of the epsilon-sharpness of groups of ``m`` samples, each with a climb of its own.

    Groups are cut from each batch in its order, of every tensor that has a row for each sample; anything else is given to all
    groups whole. What is left over at the end of a batch is a smaller group. Every sample counts the same.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        m: samples of a group, >= 1; as many as a batch has, or more, make each batch a group.
        rho, steps, relative, step_size, random_start, progress: see ``epsilon_sharpness``. ``relative`` divides by
            ``1 + L(w)`` of the group.

    Returns:
        In units of the loss; standard error and parts over the groups.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Foret et al. 2021 (arXiv 2010.01412), section 4.1.

    >>> model = torch.nn.Linear(1, 1, bias=False)  # gradients 1 and -3: together -1
    >>> data, loss_fn = [(torch.tensor([[1.0], [-3.0]]), None)], lambda out, _: out.mean()
    >>> [round(samkern.sharpness.m_sharpness(model, loss_fn, data, m=m, rho=0.1).value, 4) for m in (1, 2)]
    [0.2, 0.1]
    """
    at_least_int("m", m, 1)
    climb = Climb(rho, steps, step_size, random_start)
    with problem(model, loss_fn, data, seed) as p:
        groups = [[batch.part(i, i + m)] for batch in p.batches for i in range(0, batch.n, m)]
        return _rise(p, climb, groups, relative, progress)


@dataclass(frozen=True)
class Climb:
    """Projected gradient ascent from the weights of a problem, within ``norm(T^-1 e) <= rho``."""

    rho: float
    steps: int
    step_size: float | None
    random_start: bool
    mode: str = "euclidean"
    eta: float = 0.0

    def __post_init__(self) -> None:
        at_least("rho", self.rho, 0)
        at_least_int("steps", self.steps, 1)
        if self.step_size is not None:
            at_least("step_size", self.step_size, 0, strictly=True)

    def points(self, p: Problem, batches: Sequence[Batch]) -> Iterator[tuple[list[float], bool]]:
        """The losses of ``batches`` at each point, the first at ``w``; and whether the way there was defined.

        A point is ``w + r T^2 x / norm(T x)``. So it is known by a direction x like a gradient and by its radius r, and is
        made from ``w`` every time, rounded once.
        """
        w = p.weights
        point = [torch.empty_like(x).copy_(x) for x in w]
        saved = [torch.empty_like(x) for x in w]
        step_size = self.rho if self.step_size is None else self.step_size
        losses, g = p.losses_and_gradient(batches=batches)
        yield losses, True
        x, radius = g, min(step_size, self.rho)
        if self.random_start:
            x, radius = [z.to(math_dtype(z.dtype)) for z in p.normals(0)], self.rho
        for step in range(self.steps + self.random_start):
            if step > 0:
                ops.restore(point, saved)
                x, radius = self._stepped(x, radius, g, step_size, w)
            sums = ops.perturb(point, x, saved, radius, mode=self.mode, eta=self.eta)
            # Else the pass has left the weights as they were.
            is_defined = all(finite(row[:-1], w) for row in sums[[0, 3, 4]])
            if not is_defined or step == self.steps + self.random_start - 1:
                yield p.losses(point, batches), is_defined
                return
            losses, g = p.losses_and_gradient(point, batches)
            yield losses, True

    def _stepped(
        self, x: list[Tensor], radius: float, g: list[Tensor], step_size: float, w: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """Where a step along ``g`` leads: into ``x``, which is written."""
        shares = [radius / (self._length(x, w) or math.inf), step_size / (self._length(g, w) or math.inf)]
        coeffs = torch.tensor(shares, dtype=torch.float64, device=x[0].device)
        ops.combine(x, x, g, coeffs[0], coeffs[1])
        return x, min(self.rho, self._length(x, w))

    def _length(self, x: list[Tensor], w: Sequence[Tensor]) -> float:
        """``norm(T x)``."""
        weighted = self.mode != "euclidean"
        sums = ops.norms(x, (), w, weighting=self.mode, eta=self.eta) if weighted else ops.norms(x)
        return math.sqrt(sums[4, -1].item())


def _rise(
    p: Problem, climb: Climb, groups: Sequence[Sequence[Batch]], relative: bool, progress: bool | None
) -> Measurement:
    """The mean rise over groups; its parts are the batches of the only group, or the groups."""
    rises, sizes = [], []
    with progress_bar(len(groups) * (climb.steps + climb.random_start), "climb", "step", progress) as advance:
        for batches in groups:
            points = climb.points(p, batches)
            before, _ = next(points)
            start, best, rise = p.mean_over(before, batches), -math.inf, [math.nan] * len(batches)
            for losses, is_defined in points:
                advance(1)
                height = p.mean_over(losses, batches) if is_defined else math.nan
                if math.isnan(height):
                    rise = [math.nan] * len(batches)
                    break
                if height > best:
                    best, rise = height, [after - at_w for after, at_w in zip(losses, before, strict=True)]
            rises += [(x / (1 + start) if start != -1 else math.nan) if relative else x for x in rise]
            sizes += [batch.n for batch in batches]
    return Measurement.weighted_mean(rises, sizes)
