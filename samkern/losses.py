"""Losses that keep the model close to its own past, and so flatten the way it takes: SAF and MESA, at the price of one pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, IterableDataset

from .archive import LogitArchive
from .optim.averaging import WeightAverage
from .undisturbed import evaluating, unwrapped

Loss = Callable[[Tensor, Tensor], Tensor]


class _TrajectoryLoss:
    """The loss, and from ``start_epoch`` on the divergence from earlier answers. ``epoch`` is set by the training loop."""

    def __init__(self, lam: float, tau: float, start_epoch: int, loss: Loss) -> None:
        for name, value, strictly in (("lam", lam, False), ("tau", tau, True)):
            if not math.isfinite(value) or value < 0 or (strictly and value == 0):
                raise ValueError(f"{name} must be a finite number {'>' if strictly else '>='} 0, got {value!r}")
        self.lam, self.tau, self.loss = lam, tau, loss
        self.start_epoch = _checked_epoch("start_epoch", start_epoch, -1)
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0. To be set at the beginning of each."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch = _checked_epoch("epoch", epoch, 0)

    @property
    def is_active(self) -> bool:
        """Whether this epoch is after ``start_epoch``."""
        return self._epoch > self.start_epoch

    def _weighted(self, divergence: Tensor) -> Tensor:
        return self.lam * self.tau**2 * divergence


class SAFLoss(_TrajectoryLoss):
    """Sharpness-aware training for free: the loss, and how far answers are from those of ``lag`` epochs ago.

    ``loss(z, y) + lam tau^2 mean_i KL(softmax(Y_i / tau) || softmax(z_i / tau))``, Y_i the logits of sample i ``lag`` epochs
    ago; samples that have none count as 0. The data set must tell which samples a batch has: ``samkern.Indexed``. ::

        saf = samkern.SAFLoss(n_samples=len(dataset), n_classes=10)
        loader = DataLoader(samkern.Indexed(dataset), batch_size=128, shuffle=True)
        for saf.epoch in range(200):
            for (x, y), index in loader:
                loss = saf(model(x), y, index)

    In a SAM step both passes may call it: the archive takes the first answer of an epoch. With several processes each has the
    samples that it sees; share a file on one machine (``path=``).

    Args:
        n_samples, n_classes: of the data set.
        lam: weight of the divergence, >= 0.
        tau: temperature, > 0.
        start_epoch: the last epoch of the plain loss.
        lag: epochs, >= 1. The archive keeps ``lag + 1``.
        dtype, path, max_bytes: of the archive, see ``LogitArchive``.
        loss: of logits and targets, a mean over the batch.

    Raises:
        ValueError: an argument is out of range, or the archive would take more than ``max_bytes``.

    Du et al., NeurIPS 2022, https://arxiv.org/abs/2205.14083.

    >>> saf = samkern.SAFLoss(n_samples=2, n_classes=3, start_epoch=0, lag=1)
    >>> y, index = torch.tensor([0, 2]), torch.tensor([1, 0])
    >>> before = saf(torch.zeros(2, 3), y, index)
    >>> saf.epoch = 1
    >>> same, other = saf(torch.zeros(2, 3), y, index), saf(torch.eye(3)[:2], y, index)
    >>> before == same, other > torch.nn.functional.cross_entropy(torch.eye(3)[:2], y)
    (tensor(True), tensor(True))
    """

    def __init__(
        self,
        n_samples: int,
        n_classes: int,
        *,
        lam: float = 0.3,
        tau: float = 5.0,
        start_epoch: int = 5,
        lag: int = 3,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        max_bytes: int | None = None,
        loss: Loss = functional.cross_entropy,
    ) -> None:
        super().__init__(lam, tau, start_epoch, loss)
        self.archive = LogitArchive(n_samples, n_classes, lag, dtype=dtype, path=path, max_bytes=max_bytes)

    def __call__(self, logits: Tensor, target: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch, whose samples are ``index`` of shape (B,), best on the CPU; ``logits`` of shape (B, C)."""
        loss = self.loss(logits, target)
        then = self._epoch - self.archive.lag
        archived = self.archive.read(then, index) if self.is_active and then >= 0 else None
        if self._epoch + self.archive.lag > self.start_epoch:  # else nobody would read it
            self.archive.write(self._epoch, index, logits)
        if archived is None:
            return loss
        past, there = (x.to(logits.device, non_blocking=True) for x in archived)
        return loss + self._weighted((_divergence(past, logits, self.tau) * there).sum() / len(index))

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the archive, of a file only what it should be like."""
        return {"epoch": self._epoch, "archive": self.archive.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``. Raises ``ValueError`` if it is of another archive; nothing has been loaded then."""
        self.archive.load_state_dict(state["archive"])
        self.epoch = state["epoch"]


class MESALoss(_TrajectoryLoss):
    """SAF without an archive: the earlier answers are those of an exponential average of the weights, to the same batch.

    ``loss(z, y) + lam tau^2 mean KL(softmax(Y / tau) || softmax(z / tau))``, Y the logits of the average, in evaluation mode
    and without a gradient, from epoch ``start_epoch + 1`` on. A step costs one forward more. ::

        ema = samkern.EMA(opt, decay=0.999)
        mesa = samkern.MESALoss(model, ema)
        for mesa.epoch in range(200):
            for x, y in loader:
                loss = mesa(model(x), y, x)

    In a SAM step both passes need the same answers: give them by ``teacher=mesa.teacher(x)``, computed once before.

    Args:
        model: called with the average's weights; its buffers and modes stay as they are.
        ema: an average of its weights.
        lam: weight of the divergence, >= 0.
        tau: temperature, > 0.
        start_epoch: the last epoch of the plain loss.
        loss: of logits and targets, a mean over the batch.

    Raises:
        ValueError: an argument is out of range.

    Du et al., NeurIPS 2022, https://arxiv.org/abs/2205.14083, MESA.

    >>> model = torch.nn.Linear(2, 3)
    >>> ema = samkern.EMA(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> mesa = samkern.MESALoss(model, ema, start_epoch=0)
    >>> x, y = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
    >>> mesa(model(x), y, x) == torch.nn.functional.cross_entropy(model(x), y)
    tensor(True)
    """

    def __init__(
        self,
        model: nn.Module,
        ema: WeightAverage,
        *,
        lam: float = 0.8,
        tau: float = 5.0,
        start_epoch: int = 5,
        loss: Loss = functional.cross_entropy,
    ) -> None:
        super().__init__(lam, tau, start_epoch, loss)
        self.model, self.ema = model, ema

    def __call__(
        self, logits: Tensor, target: Tensor, *inputs: Any, teacher: Tensor | None = None, **named: Any
    ) -> Tensor:
        """The loss of a batch; classes are dimension 1 of ``logits``.

        ``inputs``, ``named``: what the model was called with; or ``teacher``, what ``teacher()`` has returned for them.
        """
        loss = self.loss(logits, target)
        if not self.is_active:
            return loss
        if teacher is None:
            if not inputs and not named:
                raise TypeError(
                    "MESALoss needs the inputs of the model, mesa(model(x), y, x), or teacher=mesa.teacher(x)"
                )
            teacher = self.teacher(*inputs, **named)
        return loss + self._weighted(_divergence(teacher, logits, self.tau).mean())

    @torch.no_grad()
    def teacher(self, *inputs: Any, **named: Any) -> Tensor:
        """The answers of the average: in evaluation mode, without a gradient. Before the first average those of the weights."""
        model = unwrapped(self.model)
        weights = self.ema.weights_of(model)
        with evaluating(model):
            answer = torch.func.functional_call(model, weights, inputs, named)
        logits: Tensor = getattr(answer, "logits", answer)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """The epoch. The average has a ``state_dict`` of its own."""
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict``."""
        self.epoch = state["epoch"]


class Indexed(Dataset[Any]):
    """A data set whose items are pairs of the item and its place: ``(item, index)``, for ``SAFLoss``.

    It has ``__getitems__`` if the data set has; the collate function of a loader sees the pairs.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> data = samkern.Indexed(TensorDataset(torch.arange(4.0), torch.arange(4)))
    >>> for (x, y), index in DataLoader(data, batch_size=2):
    ...     print(x, y, index)
    tensor([0., 1.]) tensor([0, 1]) tensor([0, 1])
    tensor([2., 3.]) tensor([2, 3]) tensor([2, 3])
    """

    def __init__(self, dataset: Any) -> None:
        has_places = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not has_places or isinstance(dataset, IterableDataset):  # which inherits a __getitem__ that raises
            raise TypeError(
                f"dataset must have a length and items, so that they have places, got {type(dataset).__name__}"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], int(index) % len(self)

    def __getattr__(self, name: str) -> Any:
        if name == "__getitems__" and callable(batched := getattr(self.dataset, name, None)):
            return lambda indices: list(zip(batched(indices), (int(i) % len(self) for i in indices), strict=True))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}; its data set is .dataset")


def _checked_epoch(name: str, epoch: int, least: int) -> int:
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {epoch!r}")
    return epoch


def _divergence(past: Tensor, logits: Tensor, tau: float) -> Tensor:
    """``KL(softmax(past / tau) || softmax(logits / tau))`` over dimension 1, in float32 at least."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    p = functional.log_softmax(past.to(dtype) / tau, 1)
    q = functional.log_softmax(logits.to(dtype) / tau, 1)
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
