"""Many measures of one model at once, for tables and reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .climbs import adaptive_sharpness, epsilon_sharpness
from .hessian import top_eigenvalue
from .measurement import Measurement
from .noise import local_entropy_gradient, lpf, pac_bayes
from .outputs import fisher_rao, shannon_entropy
from .problem import LossFn, problem


def _top_eigenvalue(
    model: nn.Module, loss_fn: LossFn, data: Any, *, progress: Any = None, **options: Any
) -> Measurement:
    found: Any = top_eigenvalue(model, loss_fn, data, **options)
    return found if isinstance(found, Measurement) else Measurement(found)


# What flatness() measures, by name, in the order of its table.
MEASURES: dict[str, Callable[..., Measurement]] = {
    "epsilon_sharpness": epsilon_sharpness,
    "adaptive_sharpness": adaptive_sharpness,
    "top_eigenvalue": _top_eigenvalue,
    "lpf": lpf,
    "pac_bayes": pac_bayes,
    "local_entropy_gradient": local_entropy_gradient,
    "fisher_rao": fisher_rao,
    "shannon_entropy": shannon_entropy,
}


def flatness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[tuple[Any, Any]],
    measures: Iterable[str] | Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Measurement]:
    """Several measures of one model, by name.

    Args:
        model, loss_fn, data, seed: see ``samkern.sharpness.problem``. ``data`` is read once.
        measures: names; or names with options of each, ``{"lpf": {"draws": 10}}``; None: all that need nothing else, with
            their usual options. Outputs must then be logits of classes.
        progress: whether to show bars, if tqdm is there; None: for those that take longer than two seconds.

    Raises:
        ValueError: a name is unknown, an option is out of range, ``data`` is empty, or nothing in the model requires a
            gradient.

    >>> model, data = torch.nn.Linear(3, 2), [(torch.randn(8, 3), torch.randint(0, 2, (8,)))]
    >>> found = samkern.sharpness.flatness(model, torch.nn.functional.cross_entropy, data, {"lpf": {"draws": 10}})
    >>> {name: m.value > 0 for name, m in found.items()}
    {'lpf': True}
    """
    wanted = MEASURES if measures is None else measures
    options = {name: measures[name] if isinstance(measures, Mapping) else {} for name in wanted}
    for name in options:
        if name not in MEASURES:
            raise ValueError(f"measures must be of {', '.join(MEASURES)}, got {name!r}")
    with problem(model, loss_fn, data, seed) as p:
        batches = [(batch.x, batch.y) for batch in p.batches]
    return {
        name: MEASURES[name](model, loss_fn, batches, **{"seed": seed, "progress": progress, **options[name]})
        for name in options
    }
