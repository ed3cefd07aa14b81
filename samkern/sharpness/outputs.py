"""Measures of what a model says of single samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from .. import ops
from ..progress import progress_bar
from ..reference import math_dtype
from .measurement import Measurement
from .problem import Batch, LossFn, Problem, problem


def fisher_rao(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The squared Fisher-Rao norm ``w'Fw``: the mean over samples of ``<grad l_j, w>^2``, ``l_j`` the loss of one sample.

    F is the empirical Fisher matrix, with the labels that were observed. All samples of a batch at once, by forward-mode
    differentiation along w, which costs about two forwards: no sample needs a gradient. A model or loss that
    ``torch.func`` does not take is computed one sample at a time, and a warning says why.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``. ``loss_fn`` is called with batches of one sample.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In units of the loss squared; standard error and parts over the samples.

    Raises:
        ValueError: ``data`` is empty, nothing in the model requires a gradient, or no loss depends on what does.

    Liang et al. 2019 (arXiv 1711.01530).

    >>> model = torch.nn.Linear(2, 1, bias=False)  # a sample's loss is w'x, and so is <grad, w>
    >>> model.weight.data = torch.tensor([[1.0, 2.0]])
    >>> found = samkern.sharpness.fisher_rao(model, lambda out, _: out.mean(), [(torch.eye(2), None)])
    >>> found.value, found.parts
    (2.5, (1.0, 4.0))
    """
    products: list[float] = []
    with problem(model, loss_fn, data, seed) as p, progress_bar(p.n_samples, "Fisher-Rao", "sample", progress) as step:
        why_one_by_one: Exception | None = None
        for batch in p.batches:
            if why_one_by_one is None and batch.n > 1:
                try:
                    products += _at_once(p, batch)
                    step(batch.n)
                    continue
                except Exception as error:  # if it is not about torch.func, the loop raises it again
                    why_one_by_one = error
            for i in range(batch.n):
                products.append(_alone(p, batch.part(i, i + 1))[0])
                step(1)
        if why_one_by_one is not None:
            why = f"{type(why_one_by_one).__name__}: {(str(why_one_by_one).splitlines() or [''])[0]}"
            warnings.warn(
                "samples were differentiated one by one, which is slower: torch.func does not take this model or loss "
                f"({why})",
                stacklevel=2,
            )
    return Measurement.mean(x * x for x in products)


def shannon_entropy(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Iterable[tuple[Any, Any]],
    *,
    dim: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """The mean over samples of ``-sum_c p_c ln p_c``, p the softmax of the outputs: how undecided the model is.

    Args:
        model, data, seed: see ``samkern.sharpness.problem``. Outputs are a tensor of logits, or have one as ``logits``.
        loss_fn: not used; may be None.
        dim: the classes', 1 as in ``torch.nn.functional.cross_entropy``; -1 for language models. Over other dimensions
            than the samples', 0, it is a mean.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In nats, 0 to the logarithm of the number of classes; standard error and parts over the samples.

    Raises:
        TypeError: outputs are something else.
        ValueError: they have no such dimension, or only one class; ``data`` is empty, or nothing in the model requires a
            gradient.

    Pereyra et al. 2017 (arXiv 1701.06548).

    >>> model = torch.nn.Linear(3, 4)
    >>> for p in model.parameters():
    ...     _ = p.data.zero_()
    >>> round(samkern.sharpness.shannon_entropy(model, None, [(torch.randn(5, 3), None)]).value, 4)  # ln 4
    1.3863
    """
    entropies: list[float] = []
    with (
        torch.no_grad(),
        problem(model, loss_fn or _no_loss, data, seed) as p,
        progress_bar(p.n_samples, "entropy", "sample", progress) as step,
    ):
        for batch in p.batches:
            logits = _logits(p, batch, dim)
            entropy = torch.special.entr(logits.softmax(dim)).sum(dim)
            entropies += _means_of_samples(entropy, torch.ones_like(entropy))
            step(batch.n)
    return Measurement.mean(entropies)


def generalisation_gap(
    model: nn.Module,
    loss_fn: LossFn | None,
    data: Iterable[tuple[Any, Any]],
    *,
    test: Iterable[tuple[Any, Any]],
    dim: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> Measurement:
    """Training accuracy minus test accuracy, in points.

    Args:
        model, seed: see ``samkern.sharpness.problem``. Outputs as for ``shannon_entropy``.
        loss_fn: not used; may be None.
        data: training batches, pairs ``(x, y)``; y are classes, or probabilities (one-hot) in the shape of the outputs.
            A class below 0 is left out.
        test: test batches.
        dim: the classes', 1 as in ``torch.nn.functional.cross_entropy``; -1 for language models.
        progress: whether to show a bar, if tqdm is there; None: after two seconds.

    Returns:
        In points, -100 to 100; standard error that of a difference of two binomial shares (with several positions in a sample,
        of means over samples); no parts.

    Raises:
        TypeError: outputs or targets are something else.
        ValueError: shapes do not fit; one of both is empty, or nothing in the model requires a gradient.

    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> train = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> test = [(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 1, 1]))]
    >>> gap = samkern.sharpness.generalisation_gap(model, None, train, test=test)
    >>> gap.value, gap.standard_error
    (25.0, 25.0)
    """
    found = [_accuracy(model, part, dim, seed, progress) for part in (data, test)]
    error = sum(of.standard_error**2 for of in found) ** 0.5
    return Measurement(100 * (found[0].value - found[1].value), 100 * error)


# ---- derivatives along the weights


def _at_once(p: Problem, batch: Batch) -> list[float]:
    """``<grad l_j, w>`` of all samples."""
    in_dims = tree_map(lambda part: 0 if batch.has_rows(part) else None, (batch.x, batch.y))

    def losses(weights: list[Tensor]) -> Any:
        def loss_of(x: Any, y: Any) -> Tensor:
            x, y = tree_map(lambda part, dim: part if dim is None else part.unsqueeze(0), (x, y), in_dims)
            return p.loss_of(weights, Batch(x, y, 1))

        return vmap(loss_of, in_dims=in_dims, randomness="different")(batch.x, batch.y)

    # Raises if the loss does not depend on the weights: its derivative would be a silent 0.
    first, size = _alone(p, batch.part(0, 1))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
        products: Tensor = jvp(losses, (p.weights,), (p.weights,))[1]
    found: list[float] = products.double().tolist()
    rounding = max(torch.finfo(w.dtype).eps for w in p.weights)
    # torch.no_grad() does not stop forward-mode derivatives.
    if abs(found[0] - first) > 0.01 * abs(first) + 20 * rounding * size:
        raise RuntimeError("forward and backward derivatives differ, as where a model uses torch.no_grad() within")
    return found


def _alone(p: Problem, sample: Batch) -> tuple[float, float]:
    """``<grad l, w>`` of one sample, and the product of the norms, the most that it can be."""
    _, g = p.gradient(batches=[sample])
    gg, gw, ww = ops.norms(g, p.weights)[:3, -1].tolist()
    return gw, (gg * ww) ** 0.5


# ---- what outputs say


def _no_loss(out: Any, y: Any) -> Tensor:
    raise TypeError("this measure takes no loss")


def _logits(p: Problem, batch: Batch, dim: int) -> Tensor:
    out = p.outputs(p.weights, batch)
    logits = out if isinstance(out, Tensor) else out.get("logits") if isinstance(out, Mapping) else None
    logits = getattr(out, "logits", None) if logits is None else logits
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a tensor of logits, or something with one as `logits`, got {type(out).__name__}; wrap it "
            "in a module that does"
        )
    if not -logits.dim() <= dim < logits.dim() or dim % logits.dim() == 0:
        raise ValueError(f"dim must be a dimension of the outputs after the samples', {tuple(logits.shape)}, got {dim}")
    if logits.shape[dim] < 2:
        raise ValueError(
            f"outputs have {logits.shape[dim]} classes, shape {tuple(logits.shape)}: give a logit for each of two"
        )
    return logits.to(math_dtype(logits.dtype))


def _means_of_samples(values: Tensor, counted: Tensor) -> list[float]:
    """The mean of each sample, dimension 0, over its positions that count; samples that have none are left out."""
    values, counted = (x.double().reshape(len(x), -1) for x in (values, counted))
    n = counted.sum(1)
    found: list[float] = (torch.where(counted > 0, values, 0).sum(1) / n)[n > 0].tolist()
    return found


def _accuracy(
    model: nn.Module, data: Iterable[tuple[Any, Any]], dim: int, seed: int, progress: bool | None
) -> Measurement:
    """The share of right answers, 0 to 1."""
    shares: list[float] = []
    with (
        torch.no_grad(),
        problem(model, _no_loss, data, seed) as p,
        progress_bar(p.n_samples, "accuracy", "sample", progress) as step,
    ):
        for batch in p.batches:
            logits = _logits(p, batch, dim)
            answers = logits.argmax(dim)
            y = _classes(batch.y, logits, answers, dim)
            right = torch.where(logits.isnan().any(dim), torch.nan, (answers == y).double())
            shares += _means_of_samples(right, y >= 0)
            step(batch.n)
    if not shares:
        raise ValueError("data has no target that counts: classes below 0 are left out")
    return Measurement.mean(shares)


def _classes(y: Any, logits: Tensor, answers: Tensor, dim: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"targets must be a tensor of classes, got {type(y).__name__}")
    if y.shape == logits.shape:
        return y.argmax(dim)
    if y.shape != answers.shape:
        raise ValueError(
            f"targets must have the shape of the answers, {tuple(answers.shape)}, or of the outputs, {tuple(logits.shape)}, "
            f"got {tuple(y.shape)}"
        )
    return y
