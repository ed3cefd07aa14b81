"""The spectrum of the Hessian of the mean loss, by Lanczos: its top, its density, and what is read off them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.checks import at_least, at_least_int, between, one_of
from ..progress import progress_bar
from .lanczos import lanczos
from .measurement import Measurement
from .problem import LossFn, problem
from .products import PRODUCTS, HessianProducts

KINDS = ("count", "share")


@dataclass(frozen=True)
class TopEigenvalues:
    """The largest eigenvalues of a Hessian, from the largest on.

    ``values``. ``errors``: an eigenvalue is at most so far from each (the residual ``norm(Hv - value v)`` and rounding).
    ``vectors``: for each a list of tensors shaped like the weights, together of norm 1; empty unless asked for.
    ``n_entries`` of the weights: how many eigenvalues there are. All values are NaN if a loss or product was not finite.

    >>> top = samkern.sharpness.TopEigenvalues((8.0, 2.0, -1.0), (0.0, 0.0, 0.0), n_entries=9)
    >>> top.log_det(cut=1.0).value == torch.tensor(16.0).double().log().item()
    True
    >>> top.count_above(1.0).value, top.share(0.75).value
    (2.0, 1.0)
    """

    values: tuple[float, ...]
    errors: tuple[float, ...]
    n_entries: int
    vectors: tuple[list[Tensor], ...] = field(default=(), repr=False)

    def log_det(self, cut: float) -> Measurement:
        """The sum of the logarithms of those above ``cut`` > 0, its ``parts``; 0 if there are none.

        Its error adds up the relative errors.
        """
        at_least("cut", cut, 0, strictly=True)
        if not self._finite:
            return Measurement(math.nan, math.nan)
        above = [(value, error) for value, error in zip(self.values, self.errors, strict=True) if value > cut]
        logs = tuple(math.log(value) for value, _ in above)
        return Measurement(math.fsum(logs), math.fsum(error / value for value, error in above), logs)

    def count_above(self, threshold: float) -> Measurement:
        """How many are above ``threshold``.

        The error is the number of those that are nearer to it than their own; infinite if all are above, because more may be.
        """
        if not self._finite:
            return Measurement(math.nan, math.nan)
        count = sum(value > threshold for value in self.values)
        near = sum(abs(v - threshold) < error for v, error in zip(self.values, self.errors, strict=True))
        unseen = count == len(self.values) < self.n_entries
        return Measurement(float(count), math.inf if unseen else float(near))

    def share(self, q: float) -> Measurement:
        """The smallest number of largest ones that together reach the share ``q`` of the sum of the positive ones.

        The error is infinite if all are positive and there are more in all: then the sum is too small, and so is the number.
        """
        between("q", q, 0, 1)
        if not self._finite:
            return Measurement(math.nan, math.nan)
        positive = [value for value in self.values if value > 0]
        # Summed up in one order, so that q=1 reaches the sum.
        sums = list(itertools.accumulate(positive, initial=0.0))
        number = next(j for j, total in enumerate(sums) if total >= q * sums[-1])
        unseen = len(positive) == len(self.values) < self.n_entries
        return Measurement(float(number), math.inf if unseen else 0.0)

    @property
    def _finite(self) -> bool:
        return all(map(math.isfinite, self.values))


def top_eigenvalues(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    k: int = 5,
    max_products: int | None = None,
    vectors: bool = False,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> TopEigenvalues:
    """The ``k`` largest eigenvalues of the Hessian of the mean loss, by Lanczos with full reorthogonalisation.

    A vector is kept for each product, float32, or float64 for float64 weights. An eigenvalue that occurs several times in a
    large Hessian may be found once. The largest converge first: see ``errors``.

    Args:
        model, loss_fn, data, product, progress: as for ``top_eigenvalue``.
        k: from 1 to the number of entries of the weights.
        max_products: at least ``k``; ``max(2 k, 20)`` if None. Never more than entries are taken: then all is exact.
        vectors: whether to return eigenvectors; each takes a vector.
        seed: of the start vectors, and of what the model draws.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.
        RuntimeError: the model cannot be differentiated twice.

    >>> model = torch.nn.Linear(3, 1, bias=False)  # loss = mean of (w x)^2 over x = (2, 0, 0), (0, 1, 0): diag(4, 1, 0)
    >>> data = [(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), None)]
    >>> top = samkern.sharpness.top_eigenvalues(model, lambda out, _: out.square().mean(), data, k=2, vectors=True)
    >>> [round(value, 4) for value in top.values], top.vectors[0][0].abs().round(decimals=4)
    ([4.0, 1.0], tensor([[1., 0., 0.]]))
    """
    at_least_int("k", k, 1)
    if max_products is None:
        max_products = max(2 * k, 20)
    at_least_int("max_products", max_products, k)
    one_of("product", product, PRODUCTS)
    with (
        problem(model, loss_fn, data, seed) as at,
        progress_bar(max_products, "eigenvalues", "product", progress) as done,
    ):
        if k > at.n_entries:
            raise ValueError(f"k must be at most the number of entries of the weights, {at.n_entries}, got {k}")
        products = HessianProducts(at, product=product)
        starts = (products.flat(at.normals(draw)) for draw in itertools.count())
        seen = lanczos(products, starts, max_products, done)
        if not seen.complete:
            return TopEigenvalues((math.nan,) * k, (math.nan,) * k, at.n_entries)
        values, coordinates = seen.eigen()
        values, coordinates = values.flip(0)[:k], coordinates.flip(1)[:, :k]
        rounding = torch.finfo(products.dtype).eps * values.abs().max().item()
        errors = [seen.last * abs(last) + rounding for last in coordinates[-1].tolist()]
        found: list[list[Tensor]] = []
        for column in coordinates.T if vectors else ():
            found.append(products.shaped(seen.basis.T @ column.to(seen.basis)))
        return TopEigenvalues(tuple(values.tolist()), tuple(errors), at.n_entries, tuple(found))


def log_det(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    cut: float,
    k: int = 20,
    max_products: int | None = None,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """Logarithm of the product of those of the ``k`` largest eigenvalues that are above ``cut``.

    The whole determinant is singular in practice. ``parts`` are the logarithms, as many as eigenvalues were above.

    Args:
        model, loss_fn, data, k, max_products, product, seed, progress: as for ``top_eigenvalues``, which has ``log_det()`` of
            what it returns.
        cut: in units of the eigenvalues, > 0.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.

    >>> model = torch.nn.Linear(3, 1, bias=False)  # loss = mean of (w x)^2 over x = (2, 0, 0), (0, 1, 0): diag(4, 1, 0)
    >>> data = [(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), None)]
    >>> found = samkern.sharpness.log_det(model, lambda out, _: out.square().mean(), data, cut=0.5, k=3)
    >>> round(found.value, 4), len(found.parts)  # ln 4 + ln 1
    (1.3863, 2)
    """
    at_least("cut", cut, 0, strictly=True)
    options: dict[str, Any] = {"max_products": max_products, "product": product, "seed": seed, "progress": progress}
    return top_eigenvalues(model, loss_fn, data, k=k, **options).log_det(cut)


def effective_dimension(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    kind: str,
    threshold: float | None = None,
    q: float = 0.9,
    k: int = 20,
    max_products: int | None = None,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """In how many directions the loss is curved, among those of the ``k`` largest eigenvalues.

    Args:
        model, loss_fn, data, k, max_products, product, seed, progress: as for ``top_eigenvalues``, which has
            ``count_above()`` and ``share()`` of what it returns.
        kind: "count", the number of eigenvalues above ``threshold``; or "share", the smallest number of largest ones that reach
            the share ``q`` of the sum of the positive ones.
        threshold: in units of the eigenvalues; "count" needs one.
        q: from 0 to 1.

    The error is infinite if more eigenvalues than ``k`` may count: take a larger one.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.

    >>> model = torch.nn.Linear(3, 1, bias=False)  # loss = mean of (w x)^2 over x = (2, 0, 0), (0, 1, 0): diag(4, 1, 0)
    >>> problem = model, lambda out, _: out.square().mean(), [(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), None)]
    >>> samkern.sharpness.effective_dimension(*problem, kind="count", threshold=0.5, k=3).value
    2.0
    >>> samkern.sharpness.effective_dimension(*problem, kind="share", q=0.75, k=3).value
    1.0
    """
    one_of("kind", kind, KINDS)
    if kind == "count" and (threshold is None or not math.isfinite(threshold)):
        raise ValueError(f"threshold must be a finite number for kind='count', got {threshold!r}")
    between("q", q, 0, 1)
    options: dict[str, Any] = {"max_products": max_products, "product": product, "seed": seed, "progress": progress}
    top = top_eigenvalues(model, loss_fn, data, k=k, **options)
    return top.share(q) if threshold is None or kind == "share" else top.count_above(threshold)


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues of a Hessian are distributed: for each probe a sum of ``weights`` at ``nodes``.

    ``nodes``, ``weights``: float64 of shape (probes, steps), on the CPU; the weights of a probe sum to 1.
    ``n_entries`` of the weights: how many eigenvalues there are. ``n_entries * moment(1)`` is their sum.

    >>> nodes, weights = torch.tensor([[0.0, 4.0]]).double(), torch.tensor([[0.75, 0.25]]).double()
    >>> density = samkern.sharpness.SpectralDensity(nodes, weights, n_entries=8)
    >>> density.moment(1).value, density.share_above(1.0).value
    (1.0, 0.25)
    >>> grid = density.grid()
    >>> round(torch.trapezoid(density(grid), grid).item(), 3)
    1.0
    """

    nodes: Tensor
    weights: Tensor
    n_entries: int

    def __call__(self, grid: Tensor, sigma: float | None = None) -> Tensor:
        """The density at ``grid``, of any shape: float64 on the CPU, the mean over probes.

        ``sigma`` > 0: standard deviation of the Gaussian that each node becomes; 1 % of the spectrum's width if None.
        """
        if sigma is None:
            sigma = self._sigma()
        else:
            at_least("sigma", sigma, 0, strictly=True)
        distance = (grid.to("cpu", torch.float64).unsqueeze(-1) - self.nodes.flatten()) / sigma
        bells = (-distance.square() / 2).exp() / (sigma * math.sqrt(2 * math.pi))
        return bells @ self.weights.flatten() / len(self.nodes)

    def grid(self, points: int = 512, sigma: float | None = None) -> Tensor:
        """Points from four ``sigma`` below the smallest node to four above the largest."""
        at_least_int("points", points, 2)
        margin = 4 * (self._sigma() if sigma is None else sigma)
        low, high = self.nodes.min().item() - margin, self.nodes.max().item() + margin
        return torch.linspace(low, high, points, dtype=torch.float64, device="cpu")

    def moment(self, power: int) -> Measurement:
        """The mean of the eigenvalues to that power, exact but for the choice of probes up to ``2 steps - 1``."""
        at_least_int("power", power, 0)
        return Measurement.mean((self.weights * self.nodes**power).sum(1).tolist())

    def share_above(self, threshold: float) -> Measurement:
        """The share of eigenvalues above ``threshold``: times ``n_entries``, an effective dimension of all of them."""
        above = torch.where(self.nodes.isnan(), self.nodes, (self.nodes > threshold).double())
        return Measurement.mean((self.weights * above).sum(1).tolist())

    def _sigma(self) -> float:
        width = (self.nodes.max() - self.nodes.min()).item()
        return width / 100 or max(abs(self.nodes.max().item()), 1.0) / 100


def spectral_density(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    probes: int = 5,
    steps: int = 60,
    product: str = "exact",
    seed: int = 0,
    progress: bool | None = None,
) -> SpectralDensity:
    """The density of all eigenvalues of the Hessian of the mean loss, by stochastic Lanczos quadrature.

    Takes ``probes * steps`` products, and keeps a vector for each of the steps.

    Args:
        model, loss_fn, data, product, progress: as for ``top_eigenvalue``.
        probes: vectors of random signs that it is averaged over, >= 1.
        steps: nodes of each, >= 1; never more than entries of the weights. Large eigenvalues get one each, the rest share.
        seed: of the signs, which are those of ``hessian_trace``, and of what the model draws.

    All nodes are NaN if a loss or product was not finite.

    Raises:
        ValueError: no batch, no parameter that requires a gradient, or an option is out of range.
        RuntimeError: the model cannot be differentiated twice.

    Lin, Saad and Yang, SIAM Review 58 (2016); Ghorbani, Krishnan and Xiao, ICML 2019 (arXiv 1901.10159).

    >>> model = torch.nn.Linear(4, 1, bias=False)  # loss = mean of (w x)^2, x = (2, 0, 0, 0): Hessian diag(8, 0, 0, 0)
    >>> data = [(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), None)]
    >>> density = samkern.sharpness.spectral_density(model, lambda out, _: out.square().mean(), data, probes=3)
    >>> round(density.n_entries * density.moment(1).value, 4), round(density.share_above(1.0).value, 4)
    (8.0, 0.25)
    """
    at_least_int("probes", probes, 1)
    at_least_int("steps", steps, 1)
    one_of("product", product, PRODUCTS)
    with (
        problem(model, loss_fn, data, seed) as at,
        progress_bar(probes * min(steps, at.n_entries), "spectral density", "product", progress) as done,
    ):
        products = HessianProducts(at, product=product)
        steps = max(1, min(steps, at.n_entries))
        nodes = torch.zeros(probes, steps, dtype=torch.float64, device="cpu")
        weights = torch.zeros_like(nodes)
        for draw in range(probes):
            seen = lanczos(products, iter([products.flat(at.signs(draw))]), steps, done)
            if not seen.complete:
                nodes.fill_(math.nan)
                weights.fill_(1 / steps)
                break
            values, coordinates = seen.eigen()
            # Where the basis was invariant early, nodes are left over: they repeat the last and weigh nothing.
            nodes[draw] = values[-1] if len(values) else 0.0
            nodes[draw, : len(values)], weights[draw, : len(values)] = values, coordinates[:1].flatten().square()
            del seen  # the basis, before the next one is made
        return SpectralDensity(nodes, weights, at.n_entries)
