"""How fast the parts of SAM's gradient turn during a training, and how long a training was."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..optim.checks import at_least, at_least_int
from ..progress import progress_bar
from ..reference import TINY
from ..undisturbed import unchanged_buffers, unwrapped
from .measurement import Measurement
from .problem import Batch, LossFn, Problem, problem


class Drift(NamedTuple):
    """Means over steps t of ``norm(x_t - x_{t+k})``, and of that over ``norm(x_t)``; the parts are the steps, in order.

    >>> one = samkern.sharpness.Measurement(1.0)
    >>> samkern.sharpness.Drift(absolute=one, relative=one).relative.value
    1.0
    """

    absolute: Measurement
    relative: Measurement


class GradientDrift(NamedTuple):
    """What ``gradient_drift`` returns: ``g_s``, the gradient at ``w + eps``; ``g_h``, its part along g; ``g_v``, the rest.

    >>> samkern.sharpness.GradientDrift._fields
    ('g_s', 'g_h', 'g_v')
    """

    g_s: Drift
    g_h: Drift
    g_v: Drift


def gradient_drift(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    make_optimizer: Callable[[list[nn.Parameter]], Any],
    rho: float = 0.05,
    k: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> GradientDrift:
    """Trains a copy of ``model``, a step on each batch, and compares the parts of SAM's gradient k steps apart.

    LookSAM reuses ``g_v`` on the premise that it drifts less than the others. Each gradient is on the batch of its step, in
    the modes of training. Costs two forward-backward pairs a step besides those of the optimizer; keeps 3 k gradients.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``; ``model`` itself stays as it is. The data is read once
            and kept: for several epochs give ``itertools.chain`` of them. A model that draws (dropout) draws the same in all
            gradients that are compared, but not in the steps.
        make_optimizer: gets the copy's parameters that require a gradient; its ``step`` is called with a closure.
        rho: radius of the perturbation, in units of the weights, >= 0.
        k: steps in between, >= 1.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        Absolute drifts in units of the loss over those of the weights, relative ones without unit. Standard errors are over t
        as if steps were independent, which neighbours are not. NaN from where the training diverges.

    Raises:
        ValueError: an option is out of range, there are not more than k batches, or nothing requires a gradient.

    Liu et al. 2022 (arXiv 2203.02714).

    >>> model, data = torch.nn.Linear(2, 1), [(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(20)]
    >>> sgd = lambda params: torch.optim.SGD(params, lr=0.1)
    >>> drift = samkern.sharpness.gradient_drift(model, torch.nn.functional.mse_loss, data, make_optimizer=sgd)
    >>> len(drift.g_v.relative.parts)  # of 20 steps, k = 5 apart
    15
    """
    at_least("rho", rho, 0)
    at_least_int("k", k, 1)
    with torch.inference_mode(False):  # whose tensors cannot be trained
        trained = copy.deepcopy(unwrapped(model))
    training = [m for m in trained.modules() if m.training]
    recent: deque[list[list[Tensor]]] = deque(maxlen=k)
    absolute: list[list[float]] = [[], [], []]
    relative: list[list[float]] = [[], [], []]
    with problem(trained, loss_fn, data, seed) as p:
        if len(p.batches) <= k:
            raise ValueError(f"data has {len(p.batches)} batches, a drift over k={k} steps needs at least {k + 1}")
        params = [w for w in trained.parameters() if w.requires_grad]
        optimizer = make_optimizer(params)
        for m in training:
            m.training = True
        with progress_bar(len(p.batches), "drift", "step", progress) as advance:
            for batch in p.batches:
                with unchanged_buffers(trained):
                    parts = _parts(p, batch, rho)
                if len(recent) == k:
                    for i, (earlier, now) in enumerate(zip(recent[0], parts, strict=True)):
                        change = math.sqrt(ops.difference_dot(earlier, now, earlier, now)[-1].item())
                        absolute[i].append(change)
                        relative[i].append(change / (math.sqrt(ops.norms(earlier)[0, -1].item()) + TINY))
                recent.append(parts)
                _step(trained, params, loss_fn, batch, optimizer)
                advance(1)
    return GradientDrift(
        *(Drift(Measurement.mean(a), Measurement.mean(r)) for a, r in zip(absolute, relative, strict=True))
    )


def standardized_epochs(pairs: float, steps_per_epoch: int) -> float:
    """Forward-backward pairs in epochs of SAM: ``pairs / (2 steps_per_epoch)``. An epoch of SGD is half a one.

    Methods are compared at equal numbers of them: a step of SAM costs as much as two of SGD.

    Args:
        pairs: in all, ``opt.evaluations``; >= 0.
        steps_per_epoch: batches of the training data, >= 1.

    Raises:
        ValueError: one is out of range.

    >>> samkern.sharpness.standardized_epochs(pairs=3000, steps_per_epoch=100)
    15.0
    """
    at_least("pairs", pairs, 0)
    at_least_int("steps_per_epoch", steps_per_epoch, 1)
    return pairs / (2 * steps_per_epoch)


def _parts(p: Problem, batch: Batch, rho: float) -> list[list[Tensor]]:
    """``g_s``, ``g_h`` and ``g_v`` at the weights as they are now."""
    _, g = p.gradient(batches=[batch])
    climbed = [torch.empty_like(w).copy_(w) for w in p.weights]
    ops.perturb(climbed, g, [torch.empty_like(w) for w in p.weights], rho)
    _, g_s = p.gradient(climbed, [batch])
    aa, ab, *_ = ops.norms(g, g_s)[:, -1]
    coeff = torch.where(aa == 0, torch.zeros_like(aa), ab / aa)
    g_h, g_v = g, [torch.empty_like(x) for x in g]
    ops.decompose(g_v, g, g_s, coeff)
    ops.combine(g_h, g, g, coeff, torch.zeros_like(coeff))
    return [g_s, g_h, g_v]


def _step(model: nn.Module, params: list[nn.Parameter], loss_fn: LossFn, batch: Batch, optimizer: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(batch.inputs()), batch.y)
        loss.backward(inputs=params)  # type: ignore[no-untyped-call]  # not into those that loss_fn may have
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)
