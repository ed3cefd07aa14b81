"""SWAD: the mean of the weights of all steps within a valley of the validation loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..options import AverageOptions
from ..shards import like, local, spread_as
from .averaging import WeightAverage, bytes_of_average, check_shapes, move_towards
from .checks import at_least, at_least_int


class Segment(NamedTuple):
    """The steps between two validations, or those of several such: mean of their weights, and how many have been taken in.

    ``averages``: what this process has of them, by parameter. ``first``, ``last``: counted from 0 at attaching, skipped steps
    too.
    """

    averages: dict[Tensor, Tensor]
    n_averaged: int
    loss: float
    first: int
    last: int


class SWAD(WeightAverage):
    """Stochastic weight averaging, densely: the mean over every step from the start to the end of a valley in validation loss.

    ::

        for epoch in range(n_epochs):
            train(model, opt)
            if swad.validate(validation_loss(model)):
                break
        swad.finish()
        swad.copy_to_weights()
        samkern.update_bn(model, loader)

    The steps between two validations are a segment, with the loss at its end. The valley starts with a segment whose loss is
    not above those of the next ``n_converge - 1``; ``(1 + tolerance_ratio)`` times the mean of these losses is the threshold.
    It ends before the first segment that is above it together with the ``n_tolerance - 1`` after it. Every step has the same
    weight.

    Args:
        optimizer: one of samkern's, whose update takes the weights in within the same pass, or any of ``torch.optim``. With the
            latter, a step that a ``GradScaler`` skips is not taken in; samkern's take in none that they skip.
        n_converge: see above, >= 1.
        n_tolerance: see above, >= 1.
        tolerance_ratio: see above, >= 0.
        on_host: keeps segments that wait for their verdict in the memory of the CPU.

    A NaN or infinite loss counts as infinite: no valley starts while there is one among the latest ``n_converge``. Under
    ``torch.distributed`` every process has to pass the same losses.

    Costs memory for ``1 + max(n_converge, n_tolerance)`` copies of the weights (float32, float64 for float64 weights) at
    most, of which ``on_host`` leaves 2 on the device; and 8 bytes of traffic per parameter and step if the update is fused.

    Raises:
        ValueError: an option is out of range; the message names it and its value.
        TypeError: ``optimizer`` is none, or has a sparse, complex or integer parameter.

    Cha et al., NeurIPS 2021, https://arxiv.org/abs/2102.08604, algorithm 1.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> swad = samkern.SWAD(opt, n_converge=2, n_tolerance=2)
    >>> for loss in (0.9, 0.5, 0.5, 0.6, 0.8, 0.9):
    ...     for _ in range(3):
    ...         opt.step()
    ...     if swad.validate(loss):
    ...         break
    >>> swad.finish()
    >>> swad.converged, swad.first_step, swad.last_step, swad.n_averaged
    (True, 3, 11, 9)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance_ratio: float = 0.3,
        on_host: bool = False,
    ) -> None:
        at_least_int("n_converge", n_converge, 1)
        at_least_int("n_tolerance", n_tolerance, 1)
        at_least("tolerance_ratio", tolerance_ratio, 0)
        self._n_converge, self._n_tolerance, self._ratio = n_converge, n_tolerance, tolerance_ratio
        self._on_host = on_host
        self._waiting: list[Segment] = []  # before the valley the latest ones, then those after it
        self._valley: Segment | None = None
        self._threshold = math.inf
        self._begin = 0  # the first step of the segment under way
        self._ended = False
        super().__init__(optimizer)

    @property
    def converged(self) -> bool:
        """Whether a valley has started."""
        return self._valley is not None and math.isfinite(self._threshold)

    @property
    def ended(self) -> bool:
        """Whether the result is final: the valley has ended, or ``finish()`` was called. Steps are not taken in any more."""
        return self._ended

    @property
    def first_step(self) -> int | None:
        """Of the valley so far, counted from 0 at attaching; None: it has not started. See ``finish()``."""
        return None if self._valley is None else self._valley.first

    @property
    def last_step(self) -> int | None:
        """The same, inclusive."""
        return None if self._valley is None else self._valley.last

    @property
    def n_averaged(self) -> int:
        """How many steps' weights are in the valley; before it has started, in the latest segment."""
        latest = self._latest()
        return int(self._taken) if latest is None else latest.n_averaged

    @property
    def averages(self) -> list[Tensor]:
        """Of the valley so far; before it has started, of the latest segment, and before there is one, of the steps so far.

        Not the same tensors every time.
        """
        latest = self._latest()
        if latest is None:
            return super().averages
        # A parameter that was added since has none there.
        return [like(x, p) if (x := latest.averages.get(p)) is not None else p.detach() for p in self._parameters()]

    def _averages_by_parameter(self) -> Mapping[Tensor, Tensor]:
        latest = self._latest()
        return (
            super()._averages_by_parameter() if latest is None else {p: like(x, p) for p, x in latest.averages.items()}
        )

    def _latest(self) -> Segment | None:
        return self._valley or (self._waiting[-1] if self._waiting else None)

    def due(self) -> AverageOptions | None:
        """How the weights after this step are taken in; None: they are not."""
        return None if self._ended else super().due()

    @torch.no_grad()
    def validate(self, loss: float | Tensor) -> bool:
        """Ends a segment, whose last weights have this validation loss. Returns ``ended``.

        Reads the device. A call after which no step was taken in changes nothing.

        Raises:
            ValueError: a negative loss, of which the threshold would be no multiple: add a constant.
            RuntimeError: the averages are swapped in: the loss is that of the weights.
        """
        self.require_out("validate()")
        loss = float(loss)
        if loss < 0:
            raise ValueError(
                f"loss must be >= 0, got {loss}: the threshold is a multiple of losses; add a constant to them"
            )
        n_averaged = int(self._taken)
        if self._ended or n_averaged == 0:
            return self._ended
        loss = loss if math.isfinite(loss) else math.inf
        parts = {p: local(x) for p, x in self._of.items()}
        segment = Segment(parts, n_averaged, loss, self._begin, self._steps - 1)
        if self._valley is None:
            self._waiting = [*self._waiting, segment][-self._n_converge :]
            self._waiting[-1] = self._kept(segment)
            self._try_to_start()
        else:
            self._waiting.append(segment)
        self._test(at_end=False)
        if self._waiting and self._waiting[-1] is segment:  # whose tensors the next steps will write
            self._waiting[-1] = self._kept(segment)
        self._taken.zero_()
        self._begin = self._steps
        return self._ended

    def _try_to_start(self) -> None:
        losses = [segment.loss for segment in self._waiting]
        threshold = (1 + self._ratio) * sum(losses) / len(losses)
        if len(losses) == self._n_converge and losses[0] == min(losses) and math.isfinite(threshold):
            self._threshold = threshold
            self._valley = _on_device(self._waiting.pop(0))

    def _test(self, at_end: bool) -> None:
        """Adds waiting segments to the valley as soon as it is known that they belong to it."""
        while self._valley is not None and self._waiting and not self._ended:
            window = self._waiting[: self._n_tolerance]
            if min(segment.loss for segment in window) <= self._threshold:
                self._extend(self._valley, self._waiting.pop(0))
            elif at_end or len(window) == self._n_tolerance:
                self._end()
            else:
                return

    def _extend(self, valley: Segment, by: Segment) -> None:
        n = valley.n_averaged + by.n_averaged
        for p, x in by.averages.items():  # a parameter that was added in between
            valley.averages.setdefault(p, x.to(p.device, copy=True))
        ours = [valley.averages[p] for p in by.averages]
        move_towards(ours, list(by.averages.values()), by.n_averaged / n)
        self._valley = valley._replace(n_averaged=n, last=by.last)

    def _kept(self, segment: Segment) -> Segment:
        averages = {p: x.to("cpu" if self._on_host else x.device, copy=True) for p, x in segment.averages.items()}
        return segment._replace(averages=averages)

    def _end(self) -> None:
        self._waiting, self._ended = [], True

    @torch.no_grad()
    def finish(self) -> None:
        """The training has ended: what waits is tested with what is known. Steps after the last validation do not count.

        If no valley has started, the last segment is the result, and ``converged`` is False.

        Raises:
            RuntimeError: ``validate`` has never closed a segment.
        """
        if self._latest() is None:
            raise RuntimeError("finish() before any segment: call validate(loss) after some steps")
        self._test(at_end=True)
        if self._valley is None:
            self._valley = _on_device(self._waiting[-1])
        self._end()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs; averages by the index of their parameter. Not the options."""
        index = {p: i for i, p in enumerate(self._parameters())}

        def plain(segment: Segment) -> dict[str, Any]:
            averages = {index[p]: like(x, p) for p, x in segment.averages.items() if p in index}
            return {**segment._asdict(), "averages": averages}

        return {
            **super().state_dict(),
            "valley": None if self._valley is None else plain(self._valley),
            "waiting": [plain(segment) for segment in self._waiting],
            "threshold": self._threshold,
            "begin": self._begin,
            "ended": self._ended,
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if ``state`` is of another kind of average, or of other parameters."""
        super().check_state_dict(state)
        params = self._parameters()
        for segment in (*state["waiting"], *([state["valley"]] if state["valley"] else [])):
            check_shapes(segment["averages"], params)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``state_dict`` back.

        Raises:
            ValueError: it is of another kind of average, or of other parameters; nothing has been loaded then.
            RuntimeError: the averages are swapped in.
        """
        super().load_state_dict(state)
        params = self._parameters()

        def segment(plain: Mapping[str, Any], on_host: bool) -> Segment:
            averages = {}
            for i, x in plain["averages"].items():
                part = local(spread_as(x, params[i]))
                averages[params[i]] = part.to("cpu" if on_host else params[i].device, copy=True)
            return Segment(**{**plain, "averages": averages})

        self._valley = None if state["valley"] is None else segment(state["valley"], on_host=False)
        self._waiting = [segment(x, self._on_host) for x in state["waiting"]]
        self._threshold, self._begin, self._ended = state["threshold"], state["begin"], state["ended"]

    def extra_bytes(self, params: Sequence[Tensor]) -> int:
        """Of averages and segments that are not there yet."""
        most = max(self._n_converge, self._n_tolerance)
        there = len(self._waiting) + (self._valley is not None)
        return super().extra_bytes(params) + (most - there) * sum(map(bytes_of_average, params)) * (not self._ended)

    def __repr__(self) -> str:
        options = f"n_converge={self._n_converge}, n_tolerance={self._n_tolerance}, tolerance_ratio={self._ratio}"
        return f"SWAD({options}, steps={self._steps}, converged={self.converged}, ended={self._ended})"


def _on_device(segment: Segment) -> Segment:
    return segment._replace(averages={p: x.to(p.device) for p, x in segment.averages.items()})
