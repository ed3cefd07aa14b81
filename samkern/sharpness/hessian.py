"""Sizes of the Hessian of the mean loss: its largest eigenvalue, trace and Frobenius norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.checks import at_least, at_least_int, one_of
from ..progress import progress_bar
from .lanczos import largest_eigenvalue
from .measurement import Measurement
from .problem import LossFn, problem
from .products import PRODUCTS, HessianProducts, inner, norm

RESTS = 0.999  # the cosine between v and Hv from which v is an eigenvector
PROBES_AT_ONCE = 8  # they share the graph of a batch; each takes two vectors


def top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    tol: float = 1e-4,
    max_products: int = 100,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """Largest eigenvalue of the loss's Hessian, the curvature along the sharpest direction: the median over batches.

    Power iteration, and Lanczos' iteration where a negative eigenvalue is larger in size. It needs four vectors;
    ``top_eigenvalues`` converges in fewer products and keeps a vector for each.

    Args:
        model: its parameters that require a gradient are the variables.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch.
        data: pairs ``(x, y)``, at least one.
        tol: relative change of the estimate, or size of the residual, at which an iteration stops, > 0.
        max_products: Hessian-vector products at which an iteration stops at the latest, >= 1; each costs about two backward
            passes.
        product: "exact", by differentiating twice, or "difference" of two gradients, where the model does not allow that:
            four digits in float32 if the loss is smooth; ReLU's kinks count.
        seed: of the start vector, and of what the model draws.
        progress: whether to show a bar; ``None``: when it takes longer than two seconds.

    Returns the values of the batches as ``parts``; NaN where a loss or product is not finite.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.
        RuntimeError: the model cannot be differentiated twice.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0): Hessian diag(8, 0)
    >>> loss = lambda out, _: out.square().mean()
    >>> round(samkern.sharpness.top_eigenvalue(model, loss, [(torch.tensor([[2.0, 0.0]]), None)]).value, 4)
    8.0
    """
    at_least("tol", tol, 0, strictly=True)
    at_least_int("max_products", max_products, 1)
    one_of("product", product, PRODUCTS)
    values = []
    with (
        problem(model, loss_fn, data, seed) as at,
        progress_bar(None, "top eigenvalue", "product", progress) as done,
    ):
        for batch in at.batches:
            products = HessianProducts(at, [batch], product)
            start = products.flat(at.normals(0))
            value, size = _power_iteration(products, start, tol, max_products, done)
            # A negative one dominates; or between eigenvalues of one size and both signs v rests anywhere, where v'Hv is
            # below norm(Hv). Power iteration on a shifted Hessian would crawl.
            if value < RESTS * size:
                value = largest_eigenvalue(products, start, tol, max_products, done)
            values.append(value)
    return Measurement.median(values)


def _power_iteration(
    product: HessianProducts, start: Tensor, tol: float, max_products: int, done: Callable[[int], object]
) -> tuple[float, float]:
    """``v'Hv`` and ``norm(Hv)`` where ``v <- Hv`` has come to rest."""
    v, length = start, norm(start)
    value = math.nan if length else 0.0
    for _ in range(max_products):
        if length == 0:
            break
        v = v / length
        image = product(v)
        # One read a product.
        found = torch.stack([inner(v, image), inner(image, image)]).tolist()
        previous, value, length = value, found[0], math.sqrt(found[1])
        done(1)
        if not math.isfinite(length):
            return math.nan, math.nan
        if abs(value - previous) <= tol * abs(value):
            break
        v = image
    return value, length


@dataclass(frozen=True)
class HessianMoments:
    """``trace`` of the Hessian and ``frobenius``, its Frobenius norm, with standard errors over probes.

    Their parts are ``v'Hv`` and ``norm(Hv)`` of the probes.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0): Hessian diag(8, 0)
    >>> data = [(torch.tensor([[2.0, 0.0]]), None)]
    >>> moments = samkern.sharpness.hessian_moments(model, lambda out, _: out.square().mean(), data, probes=3)
    >>> moments.trace.value, moments.frobenius.value
    (8.0, 8.0)
    """

    trace: Measurement
    frobenius: Measurement


def hessian_moments(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    probes: int = 30,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> HessianMoments:
    """Trace and Frobenius norm of the Hessian of the mean loss, from the same products.

    For vectors ``v`` of random signs the trace is the mean of ``v'Hv``, and the norm the root of the mean of ``norm(Hv)^2``.
    The error of the root is half that of the mean, divided by the root.

    Args:
        model, loss_fn, data, product, progress: as for ``top_eigenvalue``.
        probes: number of such vectors, >= 1, a product each. The error falls with their root; of one it is NaN.
        seed: of the signs, and of what the model draws.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.
        RuntimeError: the model cannot be differentiated twice.

    Hutchinson, Communications in Statistics 19 (1990).

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (1, 1): Hessian [[2, 2], [2, 2]]
    >>> data = [(torch.tensor([[1.0, 1.0]]), None)]
    >>> moments = samkern.sharpness.hessian_moments(model, lambda out, _: out.square().mean(), data, probes=100)
    >>> str(moments.trace), str(moments.frobenius)  # 4, 4
    ('3.60 +- 0.40', '3.79 +- 0.21')
    """
    at_least_int("probes", probes, 1)
    one_of("product", product, PRODUCTS)
    found: list[Tensor] = []
    with problem(model, loss_fn, data, seed) as at, progress_bar(probes, "Hessian", "probe", progress) as done:
        products = HessianProducts(at, product=product)
        for first in range(0, probes, PROBES_AT_ONCE):
            drawn = range(first, min(first + PROBES_AT_ONCE, probes))
            signs = [products.flat(at.signs(draw)) for draw in drawn]
            for v, image in zip(signs, products.of(signs), strict=True):
                found.append(torch.stack([inner(v, image), inner(image, image)]))
            done(len(drawn))
        traces, squares = torch.stack(found).T.tolist()  # read from the device at once
    square = Measurement.mean(squares)
    root = math.sqrt(square.value)
    error = square.standard_error / (2 * root) if root > 0 else square.standard_error
    return HessianMoments(Measurement.mean(traces), Measurement(root, error, tuple(map(math.sqrt, squares))))


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    probes: int = 30,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The trace alone: see ``hessian_moments``, which has the Frobenius norm from the same products.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0): Hessian diag(8, 0)
    >>> data = [(torch.tensor([[2.0, 0.0]]), None)]
    >>> samkern.sharpness.hessian_trace(model, lambda out, _: out.square().mean(), data, probes=3).value
    8.0
    """
    return hessian_moments(model, loss_fn, data, probes=probes, product=product, seed=seed, progress=progress).trace


def hessian_frobenius(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    probes: int = 30,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The Frobenius norm alone: see ``hessian_moments``, which has the trace from the same products.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0): Hessian diag(8, 0)
    >>> data = [(torch.tensor([[2.0, 0.0]]), None)]
    >>> samkern.sharpness.hessian_frobenius(model, lambda out, _: out.square().mean(), data, probes=3).value
    8.0
    """
    return hessian_moments(model, loss_fn, data, probes=probes, product=product, seed=seed, progress=progress).frobenius
