"""Keeps ``torch.compile`` out of what must run as it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

REASON = (
    "samkern's half-steps call native kernels and restore weights if something fails; compile the model or the closure"
)


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """To a compiler that traces its caller ``function`` is a graph break, and with ``fullgraph=True`` an error that says why.

    Else it would compile our bookkeeping, many small graphs of no use. What ``function`` calls runs as written too, but for
    what has been compiled by itself.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:  # not before: it imports the compiler, which takes seconds
            disabled = torch.compiler.disable(function, reason=REASON)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return run
