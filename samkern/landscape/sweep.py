"""Losses at many points: several at once where that is faster, kept in a file as they come."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_map

from ..extras import needed
from ..progress import progress_bar
from ..reestimate import update_bn
from ..sharpness.problem import Batch, Problem
from ..undisturbed import random_numbers, unchanged_buffers
from .result import Landscape, read, write
from .states import Named

if TYPE_CHECKING:
    from .result import Array

SAVE_EVERY = 10.0  # seconds
# Points at once. On the CPU several gain nothing with large batches (bench/landscape.py); small kernels leave a GPU idle.
PARALLEL = {"cpu": 1}
PARALLEL_ELSEWHERE = 8


@dataclass(frozen=True)
class Options:
    """What all landscapes take; their docstrings say what it means."""

    accuracy: bool | None = None
    parallel: int | None = None
    file: str | os.PathLike[str] | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.accuracy not in (True, False, None):
            raise ValueError(f"accuracy must be True, False or None, got {self.accuracy!r}")
        if self.parallel is not None and (not isinstance(self.parallel, int) or self.parallel < 1):
            raise ValueError(f"parallel must be an integer >= 1 or None, got {self.parallel!r}")


class Hash(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: Any) -> None:
        """Takes in more."""


@dataclass(frozen=True)
class Points:
    """Weights as sums of tensors: at each point, the tensor ``name`` is the sum of ``coefficients[k] * terms[name][k]``.

    ``coefficients``: float64 (points, k). A term that is None is zero. ``fixed``: what all points share and is not the
    model's own.
    """

    terms: Mapping[str, Sequence[Tensor | None]]
    fixed: Mapping[str, Tensor]
    coefficients: Tensor

    def at(self, row: int, own: Mapping[str, Tensor]) -> Named:
        """The tensors of a point, in the dtype of the model's own. Those that do not move are left out."""
        c, moved = self.coefficients[row].tolist(), {}
        for name, terms in self.terms.items():
            first, *others = [(factor, term) for factor, term in zip(c, terms, strict=True) if term is not None]
            total = first[1] * first[0] if first[0] != 1 or not others else first[1]
            for i, (factor, term) in enumerate(others):  # the first is the model's own, maybe
                total = torch.add(total, term, alpha=factor) if i == 0 else total.add_(term, alpha=factor)
            moved[name] = total.to(own[name].dtype)
        return moved

    def stacked(self, rows: Sequence[int], own: Mapping[str, Tensor]) -> Named:
        """The same of several points, stacked."""
        c, moved = self.coefficients[list(rows)], {}
        there: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # a copy to a device each, not one for every term
        for name, terms in self.terms.items():
            total: Tensor | None = None
            for k, term in enumerate(terms):
                if term is None:
                    continue
                place = (term.device, term.dtype)
                if place not in there:
                    there[place] = c.to(term)
                part = there[place][:, k].view(-1, *[1] * term.dim()) * term
                total = part if total is None else total.add_(part)
            assert total is not None
            moved[name] = total.to(own[name].dtype)
        return moved


class Sweep:
    """Computes losses and accuracies of the points of a landscape."""

    def __init__(self, problem: Problem, points: Points, options: Options, reestimate: Sequence[Any] | None) -> None:
        self.problem, self.points, self.accuracy, self.reestimate = problem, points, options.accuracy, reestimate
        self.buffers = {name for name, _ in problem.model.named_buffers()}
        self.own = {**dict(problem.model.named_parameters()), **dict(problem.model.named_buffers())}
        self.fixed = {name: x.to(self.own[name].dtype) for name, x in points.fixed.items()}
        self.n_labels = [_n_labels(batch) for batch in problem.batches]
        default = PARALLEL.get(problem.device.type, PARALLEL_ELSEWHERE) if reestimate is None else 1
        self.parallel = options.parallel or default
        if reestimate is not None and self.parallel > 1:
            warnings.warn("points are computed one by one: reestimate= runs BatchNorm in training mode", stacklevel=4)
            self.parallel = 1
        if not points.terms:  # vmap needs something to map over
            self.parallel = 1

    def of(self, rows: Sequence[int]) -> list[tuple[float, float]]:
        """Loss and accuracy at these points. Accuracy is NaN where there is none."""
        if self.parallel > 1:
            try:
                return self._at_once(rows)
            except Exception as error:
                what = "they do not fit into memory at once, lower parallel"
                if not isinstance(error, torch.OutOfMemoryError):
                    what = "torch.func.vmap cannot take the model or the loss"
                reason = f"{what}: {str(error).strip().partition(chr(10))[0]}"
            # After the block: in it, the error's traceback holds what has filled the memory.
            found = [self._alone(row) for row in rows]  # raises if it is not vmap that cannot take it
            warnings.warn(f"points are computed one by one, {reason}", stacklevel=5)
            self.parallel = 1
            return found
        return [self._alone(row) for row in rows]

    def _shared(self) -> Named:
        """What does not move. Of buffers copies, which a model may write: they are the user's."""
        return {name: x.clone() if name in self.buffers else x for name, x in self.fixed.items()}

    def _alone(self, row: int) -> tuple[float, float]:
        tensors = self.points.at(row, self.own)
        with unchanged_buffers(self.problem.model), torch.no_grad():  # the last point leaves no trace in this one
            tensors = self._shared() | tensors
            if self.reestimate is not None:
                tensors = self._with_new_statistics(tensors)
            scores = torch.stack([self._score(tensors, batch) for batch in self.problem.batches])
        return self._means(scores.tolist())

    def _at_once(self, rows: Sequence[int]) -> list[tuple[float, float]]:
        stacked, shared = self.points.stacked(rows, self.own), self._shared()
        with unchanged_buffers(self.problem.model), torch.no_grad():
            scores = torch.stack(
                [
                    # Every point sees the same random numbers, as it does alone.
                    torch.func.vmap(lambda moved, b=batch: self._score(shared | moved, b), randomness="same")(stacked)
                    for batch in self.problem.batches
                ],
                dim=1,
            )
        return [self._means(of_point) for of_point in scores.tolist()]

    def _with_new_statistics(self, tensors: Named) -> Named:
        """Estimates the statistics of BatchNorm in the model's own buffers, and leaves them out of what replaces these."""
        assert self.reestimate is not None
        params = {name for name, _ in self.problem.model.named_parameters()}
        tensors = {
            name: x for name, x in tensors.items() if name in params or not _is_statistic(self.problem.model, name)
        }
        with random_numbers(self.problem.seed, self.problem.device):
            update_bn(_Moved(self.problem.model, tensors), self.reestimate)
        return tensors

    def _score(self, tensors: Named, batch: Batch) -> Tensor:
        outputs, loss = self.problem.outputs_and_loss(tensors, batch)
        loss = loss.double()
        return torch.stack([loss, right_answers(outputs, batch.y, self.accuracy, loss)])

    def _means(self, scores: list[list[float]]) -> tuple[float, float]:
        batches = self.problem.batches
        losses, accuracies = zip(*scores, strict=True)
        answered = [batch._replace(n=n) for batch, n in zip(batches, self.n_labels, strict=True)]
        accuracy = math.nan
        if sum(self.n_labels) > 0:
            of = [(share, batch) for share, batch in zip(accuracies, answered, strict=True) if batch.n > 0]
            accuracy = self.problem.mean_over([share for share, _ in of], [batch for _, batch in of])
        return self.problem.mean_over(losses, batches), accuracy

    def _probe(self) -> float:
        """The loss of one batch amid the landscape. The code of the model and the settings of the loss show in it."""
        with unchanged_buffers(self.problem.model), torch.no_grad():
            tensors = self._shared() | self.points.at(len(self.points.coefficients) // 2, self.own)
            return float(self._score(tensors, self.problem.batches[0])[0])

    def fill(self, draft: Landscape, options: Options, identify: Callable[[], str]) -> Landscape:
        """Computes what is missing of ``draft``: the points of its grid, then those of its path.

        ``identify``: makes the ``identity_of`` the landscape, which takes a while, and is called if there is a file only.

        Raises:
            ValueError: ``options.file`` belongs to another landscape.
            OSError: it cannot be written. Nothing has been computed then.
        """
        np = needed("numpy", "landscapes")
        n = len(self.points.coefficients)
        loss, accuracy, done = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=bool)
        file = None if options.file is None else Path(options.file)
        if file is not None:
            _check_writable(file)
            identity, probe = identify(), self._probe()
            close = 1e-3 if all(w.dtype.itemsize > 2 for w in self.problem.weights) else 3e-2  # on another machine

        def take() -> None:
            """What the file has, of this process or of another that works on it too."""
            if file is not None and file.exists():
                theirs = _so_far(file, identity, n, probe, close)
                new = theirs["computed"] & ~done
                loss[new], accuracy[new], done[new] = theirs["losses"][new], theirs["accuracies"][new], True

        def save() -> None:
            if file is not None:
                take()
                more = {"identity": identity, "probe": probe, "computed": done, "losses": loss, "accuracies": accuracy}
                write(_filled(draft, loss, accuracy), file, more)

        take()
        saved, news = time.monotonic(), False
        with progress_bar(n, draft.title or draft.kind, "point", options.progress) as report:
            report(int(done.sum()))
            try:
                for lo in range(0, n, self.parallel):
                    rows = [i for i in range(lo, min(n, lo + self.parallel)) if not done[i]]
                    if not rows:
                        continue
                    loss[rows], accuracy[rows] = zip(*self.of(rows), strict=True)
                    done[rows], news = True, True
                    report(len(rows))
                    if time.monotonic() - saved > SAVE_EVERY:
                        save()
                        saved, news = time.monotonic(), False
            finally:  # of an interrupt too
                if news:
                    save()
        return _filled(draft, loss, accuracy)


class _Moved(nn.Module):
    """A model at other weights."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = model, dict(tensors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.tensors, args, kwargs)


def _n_labels(batch: Batch) -> int:
    """How many samples of it have a label that counts; all, where targets are something else."""
    if not isinstance(batch.y, Tensor) or batch.y.dtype != torch.int64 or batch.y.dim() == 0:
        return batch.n
    return int((batch.y >= 0).reshape(len(batch.y), -1).any(1).sum())


def _is_statistic(model: nn.Module, name: str) -> bool:
    owner, _, _ = name.rpartition(".")
    return isinstance(model.get_submodule(owner), nn.modules.batchnorm._BatchNorm)


def _filled(draft: Landscape, loss: Array, accuracy: Array) -> Landscape:
    shape = (len(draft.a),) if draft.b is None else (len(draft.a), len(draft.b))
    n = len(draft.a) * (1 if draft.b is None else len(draft.b))
    along_path = draft.path is not None
    has_accuracy = bool((accuracy == accuracy).any())
    return replace(
        draft,
        loss=loss[:n].reshape(shape).copy(),
        accuracy=accuracy[:n].reshape(shape).copy() if has_accuracy else None,
        path_loss=loss[n:].copy() if along_path else None,
        path_accuracy=accuracy[n:].copy() if along_path and has_accuracy else None,
    )


def _check_writable(path: Path) -> None:
    """Before hours of work, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        why = f"file={str(path)!r} cannot be written ({error.strerror}): give a name in another folder"
        raise OSError(error.errno, why) from error


def _so_far(path: Path, identity: str, n: int, probe: float, close: float) -> dict[str, Any]:
    file = read(path, "file")
    if str(file.get("identity")) == identity and len(file["computed"]) == n:
        before = float(file["probe"])
        if math.isclose(before, probe, rel_tol=close, abs_tol=1e-6) or (math.isnan(before) and math.isnan(probe)):
            return file
        raise ValueError(
            f"file={str(path)!r} is of another landscape (the model or the loss computes something else: {before:.6g} where "
            f"it is {probe:.6g} now): give another name, or delete it"
        )
    raise ValueError(
        f"file={str(path)!r} is of another landscape (other weights, data, points or options): give another name, or delete it"
    )


def right_answers(outputs: Any, y: Any, wanted: bool | None, loss: Tensor) -> Tensor:
    """Per cent of labels that are the largest logit, 0-d float64; NaN if there is none and ``wanted`` is not True.

    Labels below 0 (``ignore_index``) are left out. Where a logit is NaN there is no answer, and no accuracy.

    Raises:
        ValueError: ``wanted`` is True, and outputs and targets are no logits and labels.
    """
    integers = isinstance(y, Tensor) and y.dtype == torch.int64 and y.dim() >= 1
    logits = integers and isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() == y.dim() + 1
    logits = logits and outputs.shape[1] > 1
    if logits and wanted is not False and outputs.shape[:1] + outputs.shape[2:] == y.shape and (wanted or y.dim() == 1):
        right = torch.where(outputs.isnan().any(1), torch.nan, (outputs.argmax(1) == y).double())
        counted = y >= 0
        share: Tensor = torch.where(counted, right, 0.0).sum() / counted.sum() * 100
        return share
    if wanted:
        raise ValueError(
            "accuracy=True needs logits of shape (n, classes, ...) and int64 labels of shape (n, ...), got "
            f"{_kind_of(outputs)} and {_kind_of(y)}: leave accuracy=None"
        )
    return torch.full_like(loss, torch.nan)


def _kind_of(x: Any) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def identity_of(
    problem: Problem, tensors: Mapping[str, Any], settings: Sequence[Any], replaced: Collection[str] = ()
) -> str:
    """Of all that a landscape depends on: weights, buffers, data, the loss's name, and what it was asked for.

    ``replaced``: names of those of the model's tensors that checkpoints replace: only their dtypes count.
    """
    digest = hashlib.sha256()
    loss, model = problem.loss_fn, type(problem.model)
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    digest.update(repr((1, model.__qualname__, problem.names, name, problem.seed, *settings)).encode())
    own = {**dict(problem.model.named_parameters()), **dict(problem.model.named_buffers())}
    own = {name: x.new_empty(0) if name in replaced else x for name, x in own.items()}
    _take_in(digest, (own, tensors, [tuple(batch) for batch in problem.batches]))
    return digest.hexdigest()


def _take_in(digest: Hash, tree: Any) -> None:
    leaves, shape = tree_flatten(tree)
    digest.update(str(shape).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(repr((leaf.dtype, tuple(leaf.shape))).encode())
            x = leaf.detach()
            x = (x if x.layout == torch.strided else x.to_dense()).cpu().contiguous().reshape(-1)
            digest.update(x.view(torch.uint8).numpy())
        elif leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
            digest.update(repr(leaf).encode())
        else:  # the repr of an array is abridged, that of other things has their address
            digest.update(pickle.dumps(leaf))


def as_batches(reestimate: Any, problem: Problem) -> list[Any] | None:
    """What statistics of BatchNorm are estimated on, on the device of the weights.

    Raises:
        ValueError: there is no batch.
    """
    if reestimate is None or reestimate is False:
        return None
    if reestimate is True:
        return [(batch.x,) for batch in problem.batches]
    if not isinstance(reestimate, Iterable) or isinstance(reestimate, (str, bytes)):
        raise TypeError(f"reestimate must be True, None or a loader, got {type(reestimate).__name__}")
    batches = [tree_map(lambda x: x.to(problem.device) if isinstance(x, Tensor) else x, batch) for batch in reestimate]
    if not batches:
        raise ValueError("reestimate has no batch: give a loader that is not empty, or True to take data")
    return batches


def coefficients(draft: Landscape) -> Tensor:
    """``(1, a)`` or ``(1, a, b)`` of the points of the grid, row by row, and then of the path: float64."""
    np = needed("numpy", "landscapes")
    axes = [draft.a] if draft.b is None else [draft.a, draft.b]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    if draft.path is not None:
        places = np.concatenate([places, draft.path])
    return torch.from_numpy(np.concatenate([np.ones((len(places), 1)), places], axis=1))
