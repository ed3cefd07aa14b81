"""Parts of a model whose gradients at ``w + eps`` are taken at different times: which of them a look samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import ops
from ..options import Scaling
from ..shards import is_sharded
from .checks import at_least, at_least_int
from .gradients import inverse_sq
from .ranks import n_ranks

Spec = str | Sequence[Sequence[Tensor]] | None


class Components:
    """Every parameter belongs to one component; of each the step of its last sample is known.

    Args:
        spec: None: one component. "tensor": one for each parameter. "module": one for each module that owns parameters, of
            the model. Lists of parameters: those, and one more of the rest.
        max_component_age: a component whose last sample is so many steps ago is sampled, >= 1.
        change_tol: one whose gradient norm has changed by more than this share since then, too; None: is not looked at. Else
            costs host reads at a look.
        warmup_steps: before this step looks sample everything.

    Raises:
        ValueError: an option is out of range, or a parameter is named twice.
    """

    def __init__(self, spec: Spec, max_component_age: int, change_tol: float | None, warmup_steps: int) -> None:
        if isinstance(spec, str) and spec not in ("tensor", "module"):
            raise ValueError(f"components must be None, 'tensor', 'module' or lists of parameters, got {spec!r}")
        at_least_int("max_component_age", max_component_age, 1)
        at_least_int("warmup_steps", warmup_steps, 0)
        if change_tol is not None:
            at_least("change_tol", change_tol, 0)
        self._lists = [] if spec is None or isinstance(spec, str) else [list(part) for part in spec]
        self._how = spec if isinstance(spec, str) else None
        named = [p for part in self._lists for p in part]
        if len(set(named)) < len(named):
            raise ValueError("components name a parameter twice; every parameter belongs to one component")
        self.max_component_age, self.change_tol, self.warmup_steps = max_component_age, change_tol, warmup_steps
        self.sampled_at: dict[int, int] = {}  # by component
        self._norm_then: dict[int, float] = {}
        self._norm_now: dict[int, float] = {}
        self._before_look: dict[int, float] = {}
        self._was_skipped: Tensor | None = None  # whether norms of the last look are those of a skipped step

    @property
    def splits(self) -> bool:
        """Whether there can be more than one component."""
        return self._how is not None or bool(self._lists)

    def of(self, params: Sequence[Tensor], model: nn.Module | None) -> list[int]:
        """The component of each parameter.

        Raises:
            ValueError: "module" without a model, or a list has a parameter that is not among them.
        """
        if self._how == "tensor":
            return list(range(len(params)))
        parts = self._lists
        if self._how == "module":
            if model is None:
                raise ValueError("components='module' needs model=: it says which module owns which parameter")
            parts = [list(module.parameters(recurse=False)) for module in model.modules()]
        place = {p: k for k, part in enumerate(parts) for p in part}
        if self._lists and not place.keys() <= set(params):
            raise ValueError("components name a parameter that this optimizer does not have")
        return [place.get(p, len(parts)) for p in params]

    def due(
        self,
        t: int,
        params: Sequence[Tensor],
        component: Sequence[int],
        model: nn.Module | None,
        scaling: Scaling,
        backend: str,
    ) -> set[int]:
        """The components that a look at step ``t`` samples. First gradients are in place; ``component``: see ``of``."""
        if not self.splits:
            return {0}
        self._read()
        everything = {k for k, p in zip(component, params, strict=True) if p.requires_grad}
        self._norm_now = self._norms(params, component, scaling, backend) if self.change_tol is not None else {}
        if t < self.warmup_steps or _reduces_gradients(model) or any(map(is_sharded, params)):
            return everything
        if not all(map(math.isfinite, self._norm_now.values())):
            return set()  # the step will be skipped
        # A pass for what has no gradient now might have nothing to differentiate.
        reached = {k for k, p in zip(component, params, strict=True) if p.grad is not None}
        return {k for k in everything & reached if self._is_due(k, t)}

    def _is_due(self, k: int, t: int) -> bool:
        last = self.sampled_at.get(k)
        if last is None or t - last >= self.max_component_age:
            return True
        if self.change_tol is None:
            return False
        then = self._norm_then.get(k, 0.0)
        return abs(self._norm_now[k] - then) / (then + 1e-12) > self.change_tol

    def _norms(
        self, params: Sequence[Tensor], component: Sequence[int], scaling: Scaling, backend: str
    ) -> dict[int, float]:
        there = [(k, p.grad) for k, p in zip(component, params, strict=True) if p.grad is not None]
        squares = dict.fromkeys(component, 0.0)
        if there:
            sums = ops.norms([g for _, g in there], backend=backend)[0, :-1] * inverse_sq(scaling)
            for (k, _), square in zip(there, sums.tolist(), strict=True):
                squares[k] += square
        return {k: math.sqrt(square) if square >= 0 else math.nan for k, square in squares.items()}

    def settle(self, t: int, sampled: set[int], skipped: Tensor) -> None:
        """Step ``t`` has sampled these. If it was skipped, ages begin anew, but norms stay those of what is reused."""
        self.sampled_at.update(dict.fromkeys(sampled, t))
        if self._norm_now:
            self._before_look, self._was_skipped = dict(self._norm_then), skipped
            self._norm_then.update({k: self._norm_now[k] for k in sampled})

    def _read(self) -> None:
        if self._was_skipped is not None and self._was_skipped:
            self._norm_then = self._before_look
        self._was_skipped = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint has of it."""
        self._read()
        return {"sampled_at": dict(self.sampled_at), "norm_then": dict(self._norm_then)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes ``state`` back; an empty mapping means a fresh start."""
        self.sampled_at, self._norm_then = dict(state.get("sampled_at", {})), dict(state.get("norm_then", {}))
        self._was_skipped = None


def _reduces_gradients(model: nn.Module | None) -> bool:
    """Whether a reducer waits for the gradient of every parameter, so that a pass cannot be restricted."""
    return isinstance(model, DistributedDataParallel) or n_ranks(model) > 1
