"""Measures of flatness: what sharpness-aware training is meant to lower.

All are called alike: ``measure(model, loss_fn, data, ...)`` returns a ``Measurement``, a value with its standard error. The
model is in evaluation mode meanwhile. Afterwards its weights, buffers, modes and ``.grad``, and all random numbers, are as
they were. Weight decay is no part of the loss.
"""

from .hessian import HessianMoments, hessian_frobenius, hessian_moments, hessian_trace, top_eigenvalue
from .measurement import Measurement
from .spectrum import (
    SpectralDensity,
    TopEigenvalues,
    effective_dimension,
    log_det,
    spectral_density,
    top_eigenvalues,
)

__all__ = [
    "HessianMoments",
    "Measurement",
    "SpectralDensity",
    "TopEigenvalues",
    "effective_dimension",
    "hessian_frobenius",
    "hessian_moments",
    "hessian_trace",
    "log_det",
    "spectral_density",
    "top_eigenvalue",
    "top_eigenvalues",
]
