"""Measures of flatness: what sharpness-aware training is meant to lower.

All are called alike: ``measure(model, loss_fn, data, ...)`` returns a ``Measurement``, a value with its standard error. The
model is in evaluation mode meanwhile. Afterwards its weights, buffers, modes and ``.grad``, and all random numbers, are as
they were. Weight decay is no part of the loss.
"""

from .hessian import top_eigenvalue
from .measurement import Measurement

__all__ = ["Measurement", "top_eigenvalue"]
