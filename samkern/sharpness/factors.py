"""Measures of factors that enter a model by their product, as those of an adapter do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..lora import Adapter, factor_pairs
from ..optim.checks import at_least_int
from ..progress import progress_bar
from ..undisturbed import unwrapped
from .measurement import Measurement
from .problem import LossFn, Problem, dense, problem
from .products import differentiable_twice, refuse_dead_ends

PROBES = 64
EXACT_UP_TO = 256  # entries of all factors, each of which takes a product


def scaled_trace(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    factors: Iterable[Adapter | tuple[Tensor, Tensor]] | None = None,
    probes: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """``tr(H_LL) / d1 + tr(H_RR) / d2`` of the loss's Hessian for factors L (d1 x k) and R (d2 x k) of ``L R^T``.

    Unlike the trace, it does not depend on how many rows a factor has. For ``norm(L R^T - M)^2`` it is
    ``2 (norm(L)^2 + norm(R)^2)``. By exact products with vectors within each block (double backward).

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``. The loss must be twice differentiable.
        factors: pairs ``(L, R)`` of parameters that require a gradient, or ``samkern.Adapter``, of which b is L and the
            transpose of a is R; None: all adapters of the model.
        probes: random sign vectors per block (Hutchinson), >= 1; each costs a product, about two backward passes. None: 64, or
            one product for each entry if that is fewer than 256 in all; the traces are then exact.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of ``loss / w^2``: the mean over pairs, which are the parts. Standard error over probes; 0 if exact.

    Raises:
        TypeError: a pair is no pair.
        ValueError: there is no pair, or one of other shapes, or of what is no parameter of the model that requires a gradient;
            ``probes`` is out of range, or ``data`` is empty.
        RuntimeError: the model cannot be differentiated twice.

    >>> class Product(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.left, self.right = (torch.nn.Parameter(torch.ones(n, 2)) for n in (3, 4))
    ...     def forward(self, m):
    ...         return (self.left @ self.right.T - m).square().sum()
    >>> model, data = Product(), [(torch.zeros(3, 4), None)]
    >>> loss_fn = lambda out, _: out
    >>> samkern.sharpness.scaled_trace(model, loss_fn, data, factors=[(model.left, model.right)]).value  # 2 (6 + 8)
    28.0
    """
    if probes is not None:
        at_least_int("probes", probes, 1)
    blocks = _blocks(model, factors)
    with problem(model, loss_fn, data, seed) as p:
        own = [id(w) for w in unwrapped(model).parameters() if w.requires_grad]
        for i, (factor, _) in enumerate(blocks):
            if id(factor) not in own:
                raise ValueError(
                    f"pair {i // 2} has a factor of shape {tuple(factor.shape)} that is no parameter of the model with "
                    "requires_grad: pass the parameters themselves"
                )
        places = [own.index(id(factor)) for factor, _ in blocks]
        sizes = [factor.numel() for factor, _ in blocks]
        exact = probes is None and sum(sizes) <= EXACT_UP_TO
        n = [size if exact else probes or PROBES for size in sizes]
        forms: list[list[float]] = [[0.0] * of_block for of_block in n]
        bar = progress_bar(sum(n) * len(p.batches), "scaled trace", "product", progress)
        with bar as advance, differentiable_twice():
            for block, draw, form in _quadratic_forms(p, places, n, exact):
                forms[block][draw] += form / blocks[block][1]
                advance(1)
    if exact:
        traces = [sum(of_block) for of_block in forms]
        return replace(Measurement.mean(_paired(traces)), standard_error=0.0)
    traces = [sum(of_block) / len(of_block) for of_block in forms]
    of_draws = Measurement.mean(2 * sum(of_draw) / len(blocks) for of_draw in zip(*forms, strict=True))
    return replace(Measurement.mean(_paired(traces)), standard_error=of_draws.standard_error)


def balancedness(factors: nn.Module | Iterable[Adapter | tuple[Tensor, Tensor]]) -> Measurement:
    """``(norm(x)^2 - norm(y)^2) / 2`` of factors x, y that enter a model by their product: 0 if they are equally large.

    SGD conserves it, up to the square of its learning rate; SAM brings it nearer to 0.

    Args:
        factors: pairs ``(x, y)``, or ``samkern.Adapter``, or a model whose adapters are taken: x is a and y is b of each.

    Returns:
        In units of the weights squared: the mean over pairs, which are the parts; standard error over them.

    Raises:
        TypeError: a pair is no pair.
        ValueError: there is none.

    Li, Zhang and He 2024 (arXiv 2410.14802).

    >>> samkern.sharpness.balancedness([(torch.ones(2, 4), torch.ones(3, 2)), (torch.ones(2, 2), torch.ones(2, 2))])
    Measurement(value=0.5, standard_error=0.5, parts=(1.0, 0.0))
    """
    pairs = factor_pairs("factors", factors)
    squares = [[ops.norms([part.detach()])[0, -1].item() for part in pair] for pair in pairs]
    return Measurement.mean((x - y) / 2 for x, y in squares)


def _blocks(model: nn.Module, factors: Iterable[Any] | None) -> list[tuple[Tensor, int]]:
    """The factors, L and R of each pair after each other, and how many rows each has, by which its trace is divided."""
    given = None if factors is None else list(factors)
    blocks = []
    for i, (x, y) in enumerate(factor_pairs("factors", unwrapped(model) if given is None else given)):
        is_adapter = given is None or not isinstance(given[i], (tuple, list)) or hasattr(given[i], "a")
        left, right = (y, x.T if x.dim() == 2 else x) if is_adapter else (x, y)
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
            raise ValueError(
                f"pair {i} must be L (d1 x k) and R (d2 x k) of L R^T, got {tuple(left.shape)} and {tuple(right.shape)}; "
                "give adapters as samkern.Adapter"
            )
        blocks += [(y, left.shape[0]), (x, right.shape[0])] if is_adapter else [(x, left.shape[0]), (y, right.shape[0])]
    return blocks


def _quadratic_forms(
    p: Problem, places: Sequence[int], n: Sequence[int], exact: bool
) -> Iterator[tuple[int, int, float]]:
    """``v' H v`` of each batch by its share of the samples, for every block and each of its n vectors v."""
    leaves = p.leaves()
    factors = [leaves[place] for place in places]
    for batch in p.batches:
        _, grads = p.differentiated(leaves, batch, factors, create_graph=True)
        refuse_dead_ends(grads)
        for draw in range(max(n)):
            signs = [] if exact else p.signs(draw)
            for block, (w, g) in enumerate(zip(factors, grads, strict=True)):
                if draw >= n[block]:
                    continue
                v = _unit(w, draw) if exact else signs[places[block]]
                form = _quadratic_form(g, w, v) * batch.n / p.n_samples
                yield block, draw, form
        del grads, g  # the graph, before the next one is made


def _quadratic_form(g: Tensor, w: Tensor, v: Tensor) -> float:
    if not g.requires_grad:  # the loss is linear
        return 0.0
    hv = torch.autograd.grad(g, w, grad_outputs=v, retain_graph=True, materialize_grads=True)[0]
    return (dense(hv).double() * v.double()).sum().item()


def _unit(w: Tensor, i: int) -> Tensor:
    v = torch.zeros(w.numel(), dtype=w.dtype, device=w.device)
    v[i] = 1
    return v.view(w.shape)


def _paired(traces: Sequence[float]) -> list[float]:
    return [left + right for left, right in zip(traces[::2], traces[1::2], strict=True)]
