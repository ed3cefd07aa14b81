"""Around one set of weights: along filter-normalised random directions, or the user's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..extras import needed
from ..reference import math_dtype
from ..sharpness.problem import LossFn, Problem, problem
from .directions import normalised, random_directions
from .result import Landscape
from .states import as_list
from .sweep import Options, Points, Sweep, coefficients, identity_of

if TYPE_CHECKING:
    from .result import Array


def line(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    direction: Sequence[Tensor] | None = None,
    normalise: bool | None = None,
    points: int = 21,
    span: float = 1.0,
    seed: int = 0,
    accuracy: bool | None = None,
    parallel: int | None = None,
    file: str | os.PathLike[str] | None = None,
    title: str = "",
    progress: bool | None = None,
) -> Landscape:
    """The loss along a direction through the weights: ``L(w + a xi)``, ``a`` from ``-span`` to ``span``.

    ``a`` is in units of the norms of the filters if the direction is normalised, as a drawn one is. Tensors with fewer than
    two dimensions, those of BatchNorm, frozen ones and buffers are not moved then. Every point starts from the weights as
    they are, the model is in evaluation mode, and afterwards it is bitwise as it was, with ``.grad``, modes and random
    numbers.

    Args:
        model: its weights are the centre. ``torch.compile`` and data parallel wrappers are looked through.
        loss_fn: ``loss_fn(model(x), y)`` is the mean loss of a batch.
        data: pairs ``(x, y)``, training or test data; read once and kept on the device of the weights.
        direction: a list of tensors like the parameters that require a gradient (an eigenvector, a gradient), or None for
            a random one.
        normalise: scale each filter of ``direction`` to the norm of the weights' filter. None: only a drawn one.
        points: odd, so that the centre is one of them, >= 3.
        span: > 0.
        seed: 64 bits; of the direction, and of what model and data draw.
        accuracy: in per cent. None: where targets are an int64 vector and outputs have one dimension more, the classes. True:
            also for more dimensions, and an error where there is none. False: not.
        parallel: points at once, by ``torch.func.vmap`` over stacked weights, for as many times the memory of the activations;
            falls back to one by one with a warning. None: 1 on the CPU, where 25 pay for batches below a hundred samples only,
            else 8.
        file: an npz file that takes the points as they come. If it is there, only those that are missing are computed: call
            again after an interrupt. ``Landscape.load`` reads it at any time.
        title: shown above figures and in their legends.
        progress: whether to show a bar; None: when it takes longer than two seconds.

    Cost: a forward over ``data`` per point.

    Raises:
        ValueError: an option is out of range, ``data`` is empty, ``file`` is of another landscape, or nothing can be moved.
        TypeError: ``data`` yields no pairs, or the loss is no tensor.

    Li et al. 2018 (arXiv 1712.09913), section 4.

    >>> model = torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    >>> along = samkern.landscape.line(model, torch.nn.functional.cross_entropy, data, points=5)
    >>> along.a.tolist(), along.loss.shape, along.accuracy.shape
    ([-1.0, -0.5, 0.0, 0.5, 1.0], (5,), (5,))
    """
    given = None if direction is None else [direction]
    options, grid = Options(accuracy, parallel, file, progress), [_around_zero(points, span)]
    return _look(model, loss_fn, data, given, 1, normalise, False, grid, seed, options, title)


def surface(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    *,
    directions: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    normalise: bool | None = None,
    orthogonal: bool = False,
    points: int | tuple[int, int] = 21,
    span: float = 1.0,
    seed: int = 0,
    accuracy: bool | None = None,
    parallel: int | None = None,
    file: str | os.PathLike[str] | None = None,
    title: str = "",
    progress: bool | None = None,
) -> Landscape:
    """The loss on a plane through the weights: ``L(w + a xi + b eta)``, ``a`` and ``b`` from ``-span`` to ``span``.

    Args:
        model, loss_fn, data, normalise, span, seed, accuracy, parallel, file, title, progress: as for ``line``.
        directions: two lists of tensors, or None for random ones.
        orthogonal: make the second random direction orthogonal to the first, as whole vectors, before it is normalised.
        points: along both axes, or along either; odd, >= 3.

    Raises:
        ValueError, TypeError: as ``line``.

    Li et al. 2018 (arXiv 1712.09913), section 4.

    >>> model = torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    >>> around = samkern.landscape.surface(
    ...     model, torch.nn.functional.cross_entropy, data, points=(5, 7), file="around.npz"
    ... )
    >>> around.loss.shape  # loss[i, j] is at a[i], b[j]
    (5, 7)
    >>> around.figure().savefig("around.png")
    >>> around.html("around.html").name
    'around.html'
    """
    if directions is not None and len(directions) != 2:
        raise ValueError(f"directions must be two lists of tensors, got {len(directions)}")
    if directions is not None and orthogonal:
        raise ValueError("orthogonal=True is for directions that are drawn: make those you give orthogonal yourself")
    n, m = pair(points)
    options, grid = Options(accuracy, parallel, file, progress), [_around_zero(n, span), _around_zero(m, span)]
    return _look(model, loss_fn, data, directions, 2, normalise, orthogonal, grid, seed, options, title)


def pair(points: int | tuple[int, int]) -> tuple[int, int]:
    """Along either axis.

    Raises:
        ValueError: not one number or two.
    """
    if isinstance(points, int):
        return points, points
    if not isinstance(points, (tuple, list)) or len(points) != 2:
        raise ValueError(f"points must be an integer or a pair of them, got {points!r}")
    return points[0], points[1]


def _around_zero(points: int, span: float) -> Array:
    """From ``-span`` to ``span``, with an exact zero amid."""
    if not isinstance(points, int) or points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd, so that the centre is one of them, and >= 3, got {points!r}")
    if not isinstance(span, (int, float)) or not (math.isfinite(span) and span > 0):
        raise ValueError(f"span must be a number > 0, got {span!r}")
    np = needed("numpy", "landscapes")
    half = np.linspace(0, span, points // 2 + 1)
    found: Array = np.concatenate([-half[:0:-1], half])
    return found


def _look(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    given: Sequence[Sequence[Tensor]] | None,
    n: int,
    normalise: bool | None,
    orthogonal: bool,
    grid: list[Array],
    seed: int,
    options: Options,
    title: str,
) -> Landscape:
    with problem(model, loss_fn, data, seed) as p:
        if given is None:
            if normalise is False:
                raise ValueError(
                    "normalise=False is for directions that you give: those that are drawn have no other scale"
                )
            directions, name = (
                random_directions(model, n, orthogonal=orthogonal, seed=seed),
                "filter-normalised direction",
            )
        else:
            directions, name = _of_user(p, given, bool(normalise)), "given direction"
        names = (name, "") if n == 1 else (f"first {name}", f"second {name}")
        draft = Landscape("line" if n == 1 else "surface", title, grid[0], grid[1] if n == 2 else None, labels=names)
        terms = {
            name: [w.to(math_dtype(w.dtype)), *(x if bool(x.any()) else None for x in moves)]
            for name, w, *moves in zip(p.names, p.weights, *directions, strict=True)
            if any(bool(x.any()) for x in moves)
        }
        identity = identity_of(
            p, {"given": given}, (draft.kind, normalise, orthogonal, *(x.tolist() for x in grid), options.accuracy)
        )
        points = Points(terms, {}, coefficients(draft))
        return Sweep(p, points, options, None).fill(draft, options, identity)


def _of_user(p: Problem, given: Sequence[Sequence[Tensor]], normalise: bool) -> list[list[Tensor]]:
    own, found = dict(zip(p.names, p.weights, strict=True)), []
    for k, direction in enumerate(given):
        argument = "direction" if len(given) == 1 else f"directions[{k}]"
        tensors = list(as_list(own, direction, argument).values())
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise ValueError(f"{argument} has entries that are NaN or infinite")
        if not any(bool(x.any()) for x in tensors):
            raise ValueError(f"{argument} is zero: give one that leads somewhere")
        found.append(normalised(p, tensors) if normalise else tensors)
    return found
