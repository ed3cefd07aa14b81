"""Between checkpoints: the line from one to another, the plane through three, the plane of a training."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..extras import needed
from ..sharpness.problem import LossFn, Problem, problem
from .around import pair
from .directions import gram_schmidt, principal_plane
from .result import Landscape
from .states import Named, State, read_state
from .sweep import Options, Points, Sweep, as_batches, coefficients, identity_of

if TYPE_CHECKING:
    from .result import Array


def interpolate(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    a: State,
    b: State,
    *,
    points: int = 21,
    reestimate: bool | Iterable[Any] | None = None,
    seed: int = 0,
    accuracy: bool | None = None,
    parallel: int | None = None,
    file: str | os.PathLike[str] | None = None,
    title: str = "",
    progress: bool | None = None,
) -> Landscape:
    """The loss between two checkpoints: ``L((1 - alpha) w_a + alpha w_b)``, ``alpha`` from 0 to 1; see ``Landscape.barrier``.

    All parameters and floating-point buffers are interpolated; integer ones are the model's. The model itself is only read.

    Args:
        model, loss_fn, data, seed, accuracy, parallel, file, title, progress: as for ``line``.
        a, b: state_dicts, or lists of tensors like the parameters that require a gradient; the rest is the model's own then.
        points: >= 2, the ends among them.
        reestimate: batches or a loader as for ``samkern.update_bn``, on which the statistics of BatchNorm are estimated anew at
            every point, or True to take ``data``. None: they are interpolated as other buffers are, which is right at the
            ends only. One point at a time then.

    Raises:
        ValueError: a checkpoint does not fit the model, or as ``line``.
        TypeError: a checkpoint is something else, or as ``line``.

    Goodfellow et al. 2015 (arXiv 1412.6544), section 3.

    >>> a, b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    >>> between = samkern.landscape.interpolate(
    ...     a, torch.nn.functional.cross_entropy, data, a.state_dict(), b.state_dict(), points=5
    ... )
    >>> between.a.tolist(), between.barrier  # cross entropy of a linear layer is convex
    ([0.0, 0.25, 0.5, 0.75, 1.0], 0.0)
    """
    _at_least(points, 2, "points")
    options, np = Options(accuracy, parallel, file, progress), needed("numpy", "landscapes")
    with problem(model, loss_fn, data, seed) as p:
        ends = [read_state(model, state, argument) for state, argument in ((a, "a"), (b, "b"))]
        (first, first_buffers), (second, second_buffers) = ends
        batches = as_batches(reestimate, p)
        fixed, terms = _parted(first | first_buffers, second | second_buffers)
        draft = Landscape(
            "interpolation", title, np.linspace(0, 1, points), labels=("position between the checkpoints", "")
        )
        alpha = torch.from_numpy(draft.a)
        identity = identity_of(p, {"states": ends, "reestimate": batches}, (draft.kind, points, accuracy))
        where = Points(terms, fixed, torch.stack([1 - alpha, alpha], 1))
        return Sweep(p, where, options, batches).fill(draft, options, identity)


def plane(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    states: Sequence[State],
    *,
    points: int | tuple[int, int] = 21,
    margin: float = 0.2,
    reestimate: bool | Iterable[Any] | None = None,
    seed: int = 0,
    accuracy: bool | None = None,
    parallel: int | None = None,
    file: str | os.PathLike[str] | None = None,
    title: str = "",
    progress: bool | None = None,
) -> Landscape:
    """The loss on the plane through three checkpoints A, B, C, whose places are the ``path``.

    A is the origin, the first axis leads to B, the second is what of C - A is orthogonal to it (Gram-Schmidt). Both are
    distances in the space of weights.

    Args:
        model, loss_fn, data, seed, accuracy, parallel, file, title, progress: as for ``line``.
        states: three, as for ``interpolate``.
        points: along both axes, or along either; >= 2.
        margin: beyond the three, as a share of their extent, >= 0.
        reestimate: as for ``interpolate``. None: all buffers are those of A, so that away from it a net with BatchNorm looks
            worse than it is; warns where the checkpoints' differ.

    Raises:
        ValueError: the three lie on a line, or as ``interpolate``.
        TypeError: as ``interpolate``.

    Izmailov et al. 2018 (arXiv 1803.05407), section 3.

    >>> nets = [torch.nn.Linear(4, 3) for _ in range(3)]
    >>> data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    >>> states = [net.state_dict() for net in nets]
    >>> through = samkern.landscape.plane(nets[0], torch.nn.functional.cross_entropy, data, states, points=5)
    >>> through.loss.shape, through.path.shape, through.path[0].tolist()
    ((5, 5), (3, 2), [0.0, 0.0])
    """
    if not isinstance(states, (list, tuple)) or len(states) != 3:
        raise ValueError(f"states must be three checkpoints, got {_how_many(states)}: more of them, trajectory()")
    options = Options(accuracy, parallel, file, progress)
    with problem(model, loss_fn, data, seed) as p:
        read = [read_state(model, state, f"states[{i}]") for i, state in enumerate(states)]
        first, second, path = gram_schmidt(*(params for params, _ in read))
        labels = ("distance towards B", "distance from the line through A and B, towards C")
        draft = _on_plane("plane", title, path, labels, points, margin)
        return _swept(p, draft, read, 0, (first, second), margin, as_batches(reestimate, p), options)


def trajectory(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    states: Sequence[State],
    *,
    points: int | tuple[int, int] = 21,
    margin: float = 0.2,
    reestimate: bool | Iterable[Any] | None = None,
    seed: int = 0,
    accuracy: bool | None = None,
    parallel: int | None = None,
    file: str | os.PathLike[str] | None = None,
    title: str = "",
    progress: bool | None = None,
) -> Landscape:
    """The loss on the plane in which checkpoints along a training differ most, through the last of them, and their ``path``.

    The axes are the first two principal components of the differences to the last checkpoint, in distances in the space of
    weights; the share of the variance that either explains is in ``labels``. Checkpoints are projected onto the plane.

    Args:
        model, loss_fn, data, seed, accuracy, parallel, file, title, progress: as for ``line``.
        states: three or more in the order of the training, as for ``interpolate``; all are held in memory.
        points, margin, reestimate: as for ``plane``; buffers are those of the last one.

    Raises:
        ValueError: the checkpoints lie on a line, or as ``interpolate``.
        TypeError: as ``interpolate``.

    Li et al. 2018 (arXiv 1712.09913), section 7.

    >>> model = torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    >>> opt, states = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), []
    >>> for _ in range(5):
    ...     torch.nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    ...     opt.step()
    ...     states.append([p.detach().clone() for p in model.parameters()])
    >>> training = samkern.landscape.trajectory(model, torch.nn.functional.cross_entropy, data, states, points=5)
    >>> training.path.shape, training.labels[0][:27]
    ((5, 2), 'first principal component, ')
    """
    if not isinstance(states, (list, tuple)) or len(states) < 3:
        raise ValueError(f"states must be three checkpoints or more, got {_how_many(states)}")
    options = Options(accuracy, parallel, file, progress)
    with problem(model, loss_fn, data, seed) as p:
        read = [read_state(model, state, f"states[{i}]") for i, state in enumerate(states)]
        first, second, path, shares = principal_plane([params for params, _ in read])
        names = zip(("first", "second"), shares, strict=True)
        labels = [f"{name} principal component, {share * 100:.3g} % of the variance" for name, share in names]
        draft = _on_plane("trajectory", title, path, (labels[0], labels[1]), points, margin)
        return _swept(p, draft, read, -1, (first, second), margin, as_batches(reestimate, p), options)


def _on_plane(
    kind: str, title: str, path: Array, labels: tuple[str, str], points: int | tuple[int, int], margin: float
) -> Landscape:
    """Nothing but the grid around a path."""
    np = needed("numpy", "landscapes")
    if not isinstance(margin, (int, float)) or not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"margin must be a number >= 0, got {margin!r}")
    axes = []
    for k, n in enumerate(pair(points)):
        _at_least(n, 2, "points")
        lo, hi = path[:, k].min(), path[:, k].max()
        axes.append(np.linspace(lo - margin * (hi - lo), hi + margin * (hi - lo), n))
    return Landscape(kind, title, axes[0], axes[1], path=path, labels=labels)


def _swept(
    p: Problem,
    draft: Landscape,
    read: Sequence[tuple[Named, Named]],
    origin: int,
    axes: tuple[Named, Named],
    margin: float,
    batches: list[Any] | None,
    options: Options,
) -> Landscape:
    params, buffers = read[origin]
    differ = [name for name, x in buffers.items() if any(not torch.equal(x, other[name]) for _, other in read)]
    if differ and batches is None:
        warnings.warn(
            f"the checkpoints differ in buffers ({differ[0]}), and all points have those of states[{origin}]: "
            "reestimate=True estimates statistics of BatchNorm at every point",
            stacklevel=3,
        )
    moves = {name: [axis[name] if bool(axis[name].any()) else None for axis in axes] for name in params}
    terms = {name: [x, *moves[name]] for name, x in params.items() if any(move is not None for move in moves[name])}
    fixed = {name: x for name, x in (params | buffers).items() if name not in terms}
    settings = (draft.kind, len(draft.a), 0 if draft.b is None else len(draft.b), margin, options.accuracy)
    identity = identity_of(p, {"states": read, "reestimate": batches}, settings)
    return Sweep(p, Points(terms, fixed, coefficients(draft)), options, batches).fill(draft, options, identity)


def _parted(first: Named, second: Named) -> tuple[Named, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What two checkpoints share, and what they do not: equal tensors stay bitwise what they are."""
    fixed = {name: x for name, x in first.items() if torch.equal(x, second[name])}
    return fixed, {name: (x, second[name]) for name, x in first.items() if name not in fixed}


def _at_least(n: int, least: int, argument: str) -> None:
    if not isinstance(n, int) or n < least:
        raise ValueError(f"{argument} must be an integer >= {least}, got {n!r}")


def _how_many(states: object) -> str:
    return str(len(states)) if isinstance(states, (list, tuple)) else type(states).__name__
