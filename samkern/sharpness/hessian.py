"""The Hessian of the mean loss, seen through products with vectors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Product = Callable[[list[Tensor]], list[Tensor]]


def top_eigenvalue(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    tol: float = 1e-4,
    max_products: int = 100,
    seed: int = 0,
) -> float:
    """Largest eigenvalue of the loss's Hessian, the curvature along the sharpest direction: the median over ``batches``.

    Power iteration with exact products (double backward). A negative eigenvalue may dominate; then the iteration is
    repeated on the Hessian shifted by its size. The model is in evaluation mode meanwhile; its weights, buffers, modes and
    gradients and the global random numbers are afterwards as they were.

    Args:
        model: its parameters that require a gradient are the variables.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch, twice differentiable.
        batches: pairs ``(x, y)``; at least one.
        tol: relative change of the estimate at which an iteration stops.
        max_products: Hessian-vector products at which it stops at the latest; each costs about two backward passes.
        seed: of the start vector.

    Raises:
        ValueError: no batch, or no parameter that requires a gradient.

    >>> model = torch.nn.Linear(2, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0): Hessian diag(8, 0)
    >>> loss = lambda out, _: out.square().mean()
    >>> round(samkern.sharpness.top_eigenvalue(model, loss, [(torch.tensor([[2.0, 0.0]]), None)]), 4)
    8.0
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameter that requires a gradient")
    values = []
    with _evaluation_mode(model):
        for x, y in batches:
            product = _hessian_product(loss_fn(model(x), y), params)
            start = _random_like(params, seed)
            value = _power_iteration(product, start, tol, max_products)
            if value < 0:
                shift = -value
                value = _power_iteration(_shifted(product, shift), start, tol, max_products) - shift
            values.append(value)
    if not values:
        raise ValueError("batches is empty: the eigenvalue is of a loss over at least one batch")
    return statistics.median(values)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _hessian_product(loss: Tensor, params: Sequence[Tensor]) -> Product:
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)

    def product(v: list[Tensor]) -> list[Tensor]:
        inner = sum(((g * x).sum() for g, x in zip(grads, v, strict=True)), torch.zeros((), device=loss.device))
        return list(torch.autograd.grad(inner, params, retain_graph=True, materialize_grads=True))

    return product


def _shifted(product: Product, shift: float) -> Product:
    return lambda v: [h + shift * x for h, x in zip(product(v), v, strict=True)]


def _power_iteration(product: Product, v: list[Tensor], tol: float, max_products: int) -> float:
    value = 0.0
    for _ in range(max_products):
        length = _norm(v)
        if length == 0:
            return 0.0
        v = [x / length for x in v]
        image = product(v)
        previous, value = value, sum((h.double() * x.double()).sum().item() for h, x in zip(image, v, strict=True))
        if abs(value - previous) <= tol * abs(value):
            break
        v = image
    return value


def _norm(v: Sequence[Tensor]) -> float:
    return float(torch.stack([x.double().square().sum() for x in v]).sum().sqrt())


def _random_like(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in params]
