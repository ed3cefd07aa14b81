"""Checks of options, with messages that name the option, its value and what is allowed; warnings to those who set them."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def at_least(name: str, value: float, bound: float, *, strictly: bool = False) -> None:
    """Raises ``ValueError`` unless ``value >= bound`` (``> bound`` if ``strictly``) and finite.

    A tensor on a GPU passes: to look at it would stop the GPU.
    """
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return
        value = value.item()
    sound = isinstance(value, (int, float)) and math.isfinite(value)
    if not sound or value < bound or (strictly and value == bound):
        raise ValueError(f"{name} must be a finite number {'>' if strictly else '>='} {bound}, got {value!r}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Raises ``ValueError`` unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def at_least_int(name: str, value: int, bound: int) -> None:
    """Raises ``ValueError`` unless ``value`` is an integer ``>= bound``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < bound:
        raise ValueError(f"{name} must be an integer >= {bound}, got {value!r}")


def one_number_on(name: str, value: Any, device: torch.device) -> None:
    """Raises ``ValueError`` unless ``value`` is None or a float32 tensor of one entry on ``device``."""
    sound = isinstance(value, Tensor) and value.dtype == torch.float32 and value.numel() == 1 and value.device == device
    if value is not None and not sound:
        got = f"{value.dtype} {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a float32 tensor of one entry on {device}, got {got}")


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def warn_caller(message: str) -> None:
    """Warns about the line outside of samkern and torch that led here: an optimizer's methods are wrapped several times."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("samkern", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
