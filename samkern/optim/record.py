"""What a step tells about itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..options import Report
from .schedule import Decision


@dataclass(frozen=True)
class StepRecord:
    """One step: what it spent and what it saw. Numbers stay on the device until they are read.

    ``decision``: what became of the step. ``evaluations``: forward-backward pairs of this step. ``only_perturbed``: its one
    gradient was taken at ``w + eps``. ``parts``: how many closures the step was given; norms of its gradients at
    ``w`` are means over them (m-SAM).
    """

    decision: Decision
    evaluations: int
    had_gradients: bool
    report: Tensor
    only_perturbed: bool = False
    parts: int = 1

    @property
    def looked(self) -> bool:
        """Whether a gradient was taken at ``w + eps``."""
        return self.decision == Decision.LOOK

    @property
    def reuses(self) -> bool:
        """Whether what an earlier look left is mixed in, where something is kept."""
        return self.decision == Decision.REUSE

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the step's first gradient, over all tensors that have one: a 0-d float64 tensor on their device.

        0 with ``nonfinite="ignore"`` and without clipping on a step with one gradient, which computes no norm.
        """
        return self.report[Report.SECOND_NORM if self.only_perturbed else Report.GRAD_NORM]

    @property
    def second_norm(self) -> Tensor | None:
        """Norm of the gradient at ``w + eps``, or None if the step did not look."""
        return self.report[Report.SECOND_NORM] if self.looked else None

    @property
    def perturb_norm(self) -> Tensor | None:
        """What ``eps`` was divided by, ``norm(T g)`` over the perturbed tensors; None if the step did not look."""
        return self.report[Report.PERTURB_NORM] if self.looked else None

    @property
    def was_skipped(self) -> Tensor:
        """Whether a gradient was not finite: a 0-d bool on the device."""
        return (self.report[Report.SKIPPED_FIRST :] != 0).any()

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing. Reads the device."""
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Why the step was skipped, or None. Reads the device."""
        if not self.had_gradients:
            return "no parameter had a gradient"
        first, second = self.report[Report.SKIPPED_FIRST :].tolist()
        if first:
            return "a gradient at w was not finite"
        return "a gradient at w + eps was not finite" if second else None

    @property
    def realised(self) -> float | None:
        """Share of ``eps`` that half-precision weights could represent, ``<w' - w, eps> / norm(eps)^2``. Reads the device.

        None if the step did not look or no perturbed weight is in half precision. Near 0: the perturbation vanished below
        the last place of the weights; keep them in float32 and use autocast.
        """
        share: float = self.report[Report.REALISED_SHARE].item()
        return share if self.looked and not math.isnan(share) else None
