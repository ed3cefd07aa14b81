"""The loss in a neighbourhood, by random draws around the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..optim.checks import at_least, at_least_int
from ..progress import progress_bar
from ..reference import math_dtype
from .measurement import Measurement
from .problem import LossFn, Problem, problem

KEPT_BYTES = 256 * 2**20  # draws that are needed again are kept up to here, and made again beyond
BISECTIONS = 30
# Of the search for a radius: from the size of the weights times the smallest one to that times the largest.
SMALLEST, LARGEST = 2.0**-60, 2.0**40


def lpf(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    sigma: float = 0.01,
    draws: int = 100,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The mean loss ``E L(w + sigma z)``, z standard normal: the loss behind a low-pass filter. The loss itself is in it.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        sigma: standard deviation in units of the weights, >= 0.
        draws: >= 1; each costs a forward over the data.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of the loss; standard error and parts over the draws.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Bisla et al. 2022 (arXiv 2201.08025).

    >>> model = torch.nn.Linear(4, 1, bias=False)  # the loss is norm(w)^2, at 0
    >>> _ = model.weight.data.zero_()
    >>> loss_fn = lambda out, _: out.square().sum()
    >>> round(samkern.sharpness.lpf(model, loss_fn, [(torch.eye(4), None)], sigma=0.1).value, 2)  # 4 sigma^2
    0.04
    """
    at_least("sigma", sigma, 0)
    at_least_int("draws", draws, 1)
    with problem(model, loss_fn, data, seed) as p, progress_bar(draws, "LPF", "draw", progress) as advance:
        losses = []
        for draw in range(draws):
            losses.append(p.loss(_moved(p, p.normals(draw), sigma)))
            advance(1)
    return Measurement.mean(losses)


def pac_bayes(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    threshold: float = 0.1,
    draws: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """``1 / s^2`` for the largest s with ``E L(w + s z) - L(w) <= threshold``, z standard normal.

    The same draws serve every s. It is doubled (or halved) until it is too large (or is not) and then bisected 30 times: where
    the loss does not rise steadily, that is the first crossing met. Costs about 45 forwards over the data for each draw.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        threshold: how far the loss may rise, in its units, > 0.
        draws: >= 1. They are kept as far as 256 MiB go; beyond, they are drawn again for each s.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of ``1 / w^2``. 0 if the loss never rises so far, infinity if it does next to w; NaN if the loss at w is not
        finite. The standard error comes from that of the mean over draws at s, and the slope of that mean; no parts.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Jiang et al. 2020 (arXiv 1912.02178): sharpness after a PAC-Bayesian bound.

    >>> model = torch.nn.Linear(4, 1, bias=False)  # the loss is 5 norm(w)^2: s^2 is 0.1 / (5 * 4)
    >>> _ = model.weight.data.zero_()
    >>> loss_fn = lambda out, _: 5 * out.square().sum()
    >>> found = samkern.sharpness.pac_bayes(model, loss_fn, [(torch.eye(4), None)])
    >>> abs(found.value - 200) < 2 * found.standard_error < 100
    True
    """
    at_least("threshold", threshold, 0, strictly=True)
    at_least_int("draws", draws, 1)
    with problem(model, loss_fn, data, seed) as p, progress_bar(None, "PAC-Bayes", "draw", progress) as advance:
        at_w, noise = p.loss(), _Noise(p, draws)

        def rises(s: float) -> list[float]:
            found = []
            for draw in range(draws):
                found.append(p.loss(_moved(p, noise(draw), s)) - at_w)
                advance(1)
            return found

        if not math.isfinite(at_w):
            return Measurement(math.nan, math.nan)
        s = _largest(lambda s: sum(rises(s)) / draws <= threshold, _rms(p) or 1.0)
        if s == 0 or math.isinf(s):
            return Measurement(math.inf if s == 0 else 0.0, math.nan)
        # d(1/s^2) = -2/s^3 ds, and ds is what the mean is off, over its slope.
        error = Measurement.mean(rises(s)).standard_error
        step = s / 64
        slope = (sum(rises(s + step)) - sum(rises(s - step))) / (2 * step * draws)
    return Measurement(s**-2, 2 * s**-3 * error / abs(slope) if slope != 0 else math.nan)


def local_entropy_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    rho: float = 0.05,
    draws: int = 20,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """``norm(sum_j p_j grad L(w + d_j))``, d_j uniform in the ball of radius ``rho``, ``p = softmax(-L(w + d_j))``.

    The gradient of the local entropy ``-ln E exp(-L(w + d))``, which is flat where the loss is low all around. The noise of
    the mean adds to its norm: about ``n standard_error^2 / (2 value)`` if it is alike in all n directions.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``.
        rho: radius, in units of the weights, >= 0.
        draws: >= 1; each costs two forward-backward pairs over the data, one of them for the standard error.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of the loss over those of the weights; standard error to first order, over the draws; no parts.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, or nothing in the model requires a gradient.

    Chaudhari et al. 2017 (arXiv 1611.01838), with a ball in place of the Gaussian kernel.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # the loss is 3 w_0 for this x
    >>> data = [(torch.tensor([[3.0, 0.0]]), None)]
    >>> round(samkern.sharpness.local_entropy_gradient(model, lambda out, _: out.mean(), data).value, 4)
    3.0
    """
    at_least("rho", rho, 0)
    at_least_int("draws", draws, 1)
    with (
        problem(model, loss_fn, data, seed) as p,
        progress_bar(draws * (1 + (draws > 1)), "local entropy", "draw", progress) as advance,
    ):
        # Draws so far: the lowest loss, and sums of exp(lowest - L) and of that times the gradient.
        losses: list[float] = []
        lowest, weight, total = math.inf, 0.0, None
        for draw in range(draws):
            loss, g = p.gradient(_in_ball(p, draw, rho))
            losses.append(loss)
            advance(1)
            if math.isnan(loss):
                return Measurement(math.nan, math.nan)
            if total is None:
                lowest, weight, total = loss, 1.0, g
                continue
            before, now = (math.exp(min(lowest, loss) - x) for x in (lowest, loss))
            ops.combine(total, total, g, _scalar(before, g), _scalar(now, g))
            lowest, weight = min(lowest, loss), before * weight + now
        assert total is not None
        ops.combine(total, total, total, _scalar(1 / weight, total), _scalar(0, total))
        norm_sq = ops.norms(total)[0, -1].item()
        if draws == 1 or not 0 < norm_sq < math.inf:
            return Measurement(math.sqrt(norm_sq), math.nan)
        # Of a quotient of two means, draw j moves the norm by p_j <g_j - total, total> / norm(total).
        variance = 0.0
        for draw, loss in enumerate(losses):
            _, g = p.gradient(_in_ball(p, draw, rho))
            along = ops.norms(g, total)[1, -1].item() - norm_sq
            variance += (math.exp(lowest - loss) / weight * along) ** 2 / norm_sq
            advance(1)
    return Measurement(math.sqrt(norm_sq), math.sqrt(variance * draws / (draws - 1)))


# ---- points around the weights


def _moved(p: Problem, z: list[Tensor], scale: float) -> list[Tensor]:
    """``w + scale z``, rounded once, in new memory."""
    # Of half-precision tensors torch makes the factor half-precision too.
    moved = []
    for w, x in zip(p.weights, z, strict=True):
        dtype = math_dtype(w.dtype)
        moved.append(torch.add(w.to(dtype), x.to(dtype), alpha=scale).to(w.dtype))
    return moved


def _in_ball(p: Problem, draw: int, rho: float) -> list[Tensor]:
    z = p.normals(draw)
    length = math.sqrt(ops.norms(z)[0, -1].item())
    return _moved(p, z, rho * p.uniform(draw) ** (1 / max(p.n_entries, 1)) / length if length > 0 else 0.0)


class _Noise:
    """Normal numbers of some draws, which are asked for again and again."""

    def __init__(self, p: Problem, draws: int) -> None:
        n_bytes = sum(w.numel() * w.element_size() for w in p.weights)
        self._p, self._n_kept = p, min(draws, KEPT_BYTES // max(n_bytes, 1))
        self._kept: list[list[Tensor]] = []

    def __call__(self, draw: int) -> list[Tensor]:
        if draw < len(self._kept):
            return self._kept[draw]
        z = self._p.normals(draw)
        if draw < self._n_kept:
            self._kept.append(z)
        return z


def _rms(p: Problem) -> float:
    """The size of a weight: the root of the mean square; 0 also where that is not finite."""
    mean_sq = ops.norms(p.weights)[0, -1].item() / max(p.n_entries, 1)
    return math.sqrt(mean_sq) if math.isfinite(mean_sq) else 0.0


def _largest(holds: Callable[[float], bool], unit: float) -> float:
    """The s above which ``holds(s)`` ends: 0 if it never holds, infinity if it always does."""
    s = unit / 1024
    while not holds(s):
        s /= 2
        if s < unit * SMALLEST:
            return 0.0
    while holds(2 * s):
        s *= 2
        if s > unit * LARGEST:
            return math.inf
    low, high = s, 2 * s
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _scalar(value: float, like: list[Tensor]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=like[0].device)
