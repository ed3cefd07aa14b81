"""The Hessian of a mean loss as a map of vectors: nothing larger than a few vectors is ever stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..optim.checks import one_of
from ..reference import math_dtype
from .problem import Batch, Problem, dense

PRODUCTS = ("exact", "difference")
INSTEAD = "; product='difference' does without"


class _Graph(NamedTuple):
    """Gradients that can be differentiated again, those among them that depend on the weights."""

    leaves: list[Tensor]
    gradients: list[Tensor]
    which: list[int]


class HessianProducts:
    """``products(v)`` is the Hessian of the mean loss over ``batches`` times ``v``.

    Vectors are flat: all entries of the weights in order, float64 if a weight is float64, else float32. Half-precision weights
    see them rounded to their own dtype. Sums over batches are weighted by samples.

    "exact": a second backward pass through the first one's graph. Of one batch the graph is kept, so that a product costs
    about two backward passes; of several each is computed anew for every call, so that memory is that of one batch.
    "difference": ``(grad(w + h v) - grad(w - h v)) / 2h``, two gradients a product, for models whose backward pass cannot be
    differentiated. ``h v`` is as long as the cube root of the rounding unit (0.005 in float32) times ``1 + norm(w)``, where
    rounding and third derivatives err about alike: 4 digits in float32, 10 in float64, 1 in bfloat16. Kinks of ReLU, which
    derivatives do not see, it sees: in float32 products with random vectors may be all kinks.
    """

    def __init__(self, problem: Problem, batches: Sequence[Batch] | None = None, product: str = "exact") -> None:
        one_of("product", product, PRODUCTS)
        self.problem, self.product = problem, product
        self.batches = problem.batches if batches is None else batches
        self.n = problem.n_entries
        doubles = any(w.dtype == torch.float64 for w in problem.weights)
        self.dtype = torch.float64 if doubles else torch.float32
        self._n_samples = sum(batch.n for batch in self.batches)
        self._kept: _Graph | None = None

    def __call__(self, v: Tensor) -> Tensor:
        return self.of([v])[0]

    def of(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products with several vectors, for which a graph is computed once."""
        if self.product == "difference":
            return [self._difference(v) for v in vectors]
        totals = [torch.zeros_like(v) for v in vectors]
        for batch in self.batches:
            graph = self._graph(batch)
            for total, v in zip(totals, vectors, strict=True):
                total.add_(self._second_backward(graph, v), alpha=batch.n / self._n_samples)
            del graph  # before the next one is made
        return totals

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One vector of what is shaped like the weights."""
        return torch.cat([dense(x).reshape(-1).to(self.dtype) for x in tensors])

    def shaped(self, v: Tensor) -> list[Tensor]:
        """A vector as tensors shaped like the weights: views."""
        weights = self.problem.weights
        return [
            part.view(w.shape) for part, w in zip(torch.split(v, [w.numel() for w in weights]), weights, strict=True)
        ]

    def _graph(self, batch: Batch) -> _Graph:
        if self._kept is not None:
            return self._kept
        leaves = self.problem.leaves()
        with differentiable_twice(INSTEAD):
            _, gradients = self.problem.differentiated(leaves, batch, create_graph=True)
            refuse_dead_ends(gradients)
        which = [i for i, g in enumerate(gradients) if g.requires_grad]
        graph = _Graph(leaves, [gradients[i] for i in which], which)
        if len(self.batches) == 1:
            self._kept = graph
        return graph

    def _second_backward(self, graph: _Graph, v: Tensor) -> Tensor:
        if not graph.which:  # the loss is linear in the weights
            return torch.zeros_like(v)
        parts = self.shaped(v)
        # v as the gradient of the gradients: <g, v> is differentiated without being computed.
        along = [parts[i] for i in graph.which]
        with differentiable_twice(INSTEAD):
            found: tuple[Tensor, ...] = torch.autograd.grad(
                graph.gradients, graph.leaves, grad_outputs=along, retain_graph=True, materialize_grads=True
            )
        return self.flat(found)

    def _difference(self, v: Tensor) -> Tensor:
        weights = self.problem.weights
        length = norm(v)
        if not 0 < length < math.inf:
            return v * 0  # of NaN: NaN
        rounding = max(torch.finfo(w.dtype).eps for w in weights)
        h: float = rounding ** (1 / 3) * (1 + norm(self.flat(weights))) / length
        ahead, behind = (self.flat(self.problem.gradient(self._moved(v, step), self.batches)[1]) for step in (h, -h))
        return (ahead - behind) / (2 * h)

    def _moved(self, v: Tensor, step: float) -> list[Tensor]:
        parts = zip(self.problem.weights, self.shaped(v), strict=True)
        return [(w.to(math_dtype(w.dtype)) + step * part).to(w.dtype) for w, part in parts]


@contextmanager
def differentiable_twice(instead: str = "") -> Iterator[None]:
    """Attention is computed in the one way whose backward pass can be differentiated; of what cannot, the error says so."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except (RuntimeError, NotImplementedError) as error:
        if any(said in str(error) for said in ("is not implemented", "not supported", "twice", "once_differentiable")):
            raise RuntimeError(f"the model's backward pass cannot be differentiated: {error}{instead}") from error
        raise


def refuse_dead_ends(gradients: Sequence[Tensor]) -> None:
    """Raises at a function that is differentiable once: torch does not go there, and would leave its part out in silence."""
    nodes = [g.grad_fn for g in gradients]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if node.name() == "torch::autograd::Error":
                raise RuntimeError("it goes through a function that is marked with @once_differentiable")
            nodes.extend(following for following, _ in node.next_functions)


def dots(rows: Tensor, v: Tensor) -> Tensor:
    """Products of each row and ``v``, in float64, without a float64 copy of it all."""
    found = torch.zeros(len(rows), dtype=torch.float64, device=v.device)
    chunk = 1 << 16 if v.device.type == "cpu" else 1 << 20
    for lo in range(0, v.numel(), chunk):
        found += rows[:, lo : lo + chunk].double() @ v[lo : lo + chunk].double()
    return found


def inner(v: Tensor, w: Tensor) -> Tensor:
    """The inner product, 0-d float64."""
    return dots(v.unsqueeze(0), w)[0]


def norm(v: Tensor) -> float:
    """The Euclidean norm, read from the device."""
    return math.sqrt(inner(v, v).item())
