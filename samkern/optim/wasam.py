"""WASAM: SAM, and the mean of its weights in the last phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .averaging import SWA
from .checks import at_least_int, between
from .sam import SAM


class WASAM(SAM):
    """SAM whose result is ``opt.average``, the mean of its weights in the last phase of the training.

    At the end::

        opt.average.copy_to_weights()
        samkern.update_bn(model, loader)

    Args:
        params: parameters or param groups, as for ``torch.optim``.
        base: a ``torch.optim`` class, whose options follow as keywords, or a ready instance.
        rho: radius of the perturbation, in units of the weights, >= 0.
        total_steps: of the training, >= 1. Steps beyond are averaged too.
        start: the share of them after which averaging begins, from 0 to 1. Averaging begins at the last one at the latest.
        every: takes in every so many steps from there; None: ``max(1, total_steps // 100)``.
        options: further options of ``SAM`` (``adaptive``, ``p``), of ``SharpnessAware`` and of ``base``.

    A step costs 2 forward-backward pairs, SAM's memory, and from ``start`` on a float32 copy of the weights. The average is
    part of the optimizer's checkpoints and copies.

    Raises:
        ValueError: an option is out of range; the message names it and its value.

    Kaddour et al., NeurIPS 2022, https://arxiv.org/abs/2202.00661.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.WASAM(model.parameters(), torch.optim.SGD, lr=0.1, total_steps=8)
    >>> for _ in range(8):
    ...     _ = opt.step(lambda: model(torch.ones(4, 2)).square().mean().backward())
    >>> opt.average.n_averaged
    2
    >>> opt.average.copy_to_weights()
    """

    # Made anew by copies: it refers to its optimizer.
    _TRANSIENT = SAM._TRANSIENT | {"average"}

    average: SWA

    def __init__(
        self,
        params: Any,
        base: Any,
        rho: float = 0.05,
        *,
        total_steps: int,
        start: float = 0.75,
        every: int | None = None,
        **options: Any,
    ) -> None:
        at_least_int("total_steps", total_steps, 1)
        between("start", start, 0, 1)
        if every is not None:
            at_least_int("every", every, 1)
        super().__init__(params, base, rho, **options)
        self._sampling = {
            "start": min(round(start * total_steps), total_steps - 1),
            "every": max(1, total_steps // 100) if every is None else every,
        }
        self.average = SWA(self, **self._sampling)

    def own_state(self) -> dict[str, Any]:
        """With the average."""
        state = self.average.state_dict()
        return {**super().own_state(), "average": state.pop("averages"), "averaging": state}

    def check_own_state(self, state: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` if our part of a checkpoint is of other parameters or in another format; ``RuntimeError`` while
        the average is swapped in.
        """
        self.average.require_out("load_state_dict()")
        super().check_own_state(state)
        if "averaging" in state:
            self.average.check_state_dict(_of_average(state))

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Takes ``own_state`` back. The average starts fresh if it is not in it."""
        super().load_own_state(state)
        if "averaging" in state:
            self.average.load_state_dict(_of_average(state))
        else:
            self.average.restart(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        self.average.require_out("copying or pickling")
        return {**super().__getstate__(), "_average_state": self.average.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        average = state.get("_average_state")
        super().__setstate__({name: value for name, value in state.items() if name != "_average_state"})
        if average is not None:
            self.average = SWA(self, **self._sampling)
            self.average.load_state_dict(average)


def _of_average(state: Mapping[str, Any]) -> dict[str, Any]:
    return {**state["averaging"], "averages": state.get("average", {})}
