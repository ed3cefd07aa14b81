"""Measures of flatness: what sharpness-aware training is meant to lower.

All are called alike: ``measure(model, loss_fn, data, ...)`` returns a ``Measurement``, a value with its standard error. The
model is in evaluation mode meanwhile. Afterwards its weights, buffers, modes and ``.grad``, and all random numbers, are as
they were. Weight decay is no part of the loss.
"""

from .climbs import adaptive_sharpness, epsilon_sharpness, m_sharpness
from .drift import Drift, GradientDrift, gradient_drift, standardized_epochs
from .factors import balancedness, scaled_trace
from .flatness import flatness
from .hessian import top_eigenvalue
from .measurement import Measurement
from .noise import local_entropy_gradient, lpf, pac_bayes
from .outputs import fisher_rao, generalisation_gap, shannon_entropy

__all__ = [
    "Drift",
    "GradientDrift",
    "Measurement",
    "adaptive_sharpness",
    "balancedness",
    "epsilon_sharpness",
    "fisher_rao",
    "flatness",
    "generalisation_gap",
    "gradient_drift",
    "local_entropy_gradient",
    "lpf",
    "m_sharpness",
    "pac_bayes",
    "scaled_trace",
    "shannon_entropy",
    "standardized_epochs",
    "top_eigenvalue",
]
