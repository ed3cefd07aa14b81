"""Sharpness-aware optimizers for PyTorch, with the arithmetic over the weights fused into single passes."""

import warnings

__version__ = "0.1.0"

from . import ops, optim, sharpness
from .backends import NotBuiltError, backends, info, native, use_backend
from .batchnorm import frozen_running_stats
from .bitmask import BitMask
from .optim import ASAM, SAM, LookLayerSAM, LookSAM, SAMk, SharpnessAware

if native is None:
    warnings.warn(f"samkern runs on plain PyTorch passes, which are slower: {backends()['cpu'].why}", stacklevel=2)

__all__ = [
    "ASAM",
    "SAM",
    "BitMask",
    "LookLayerSAM",
    "LookSAM",
    "NotBuiltError",
    "SAMk",
    "SharpnessAware",
    "backends",
    "frozen_running_stats",
    "info",
    "ops",
    "optim",
    "sharpness",
    "use_backend",
]
