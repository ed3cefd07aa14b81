"""Sharpness-aware optimizers for PyTorch, with the arithmetic over the weights fused into single passes."""

import warnings

__version__ = "0.1.0"

from . import fisher, history, landscape, ops, optim, reporting, sharpness
from .archive import LogitArchive
from .backends import NotBuiltError, backends, info, native, use_backend
from .batchnorm import frozen_running_stats
from .bitmask import BitMask
from .fisher import SampleLosses
from .lora import Adapter
from .losses import Indexed, MESALoss, SAFLoss
from .optim import (
    AESAM,
    ARSAM,
    ASAM,
    BAR,
    EMA,
    GRST,
    LETSASAM,
    LETSSAM,
    LPFSGD,
    MSAM,
    RST,
    SAM,
    SSAMD,
    SSAMF,
    SWA,
    SWAD,
    WASAM,
    AELookSAM,
    FlatLoRA,
    LookLayerSAM,
    LookSAM,
    LoRASAM,
    SAMk,
    SharpnessAware,
)
from .reestimate import update_bn
from .reporting import RunFolder, report

if native is None:
    warnings.warn(f"samkern runs on plain PyTorch passes, which are slower: {backends()['cpu'].why}", stacklevel=2)

__all__ = [
    "AESAM",
    "ARSAM",
    "ASAM",
    "BAR",
    "EMA",
    "GRST",
    "LETSASAM",
    "LETSSAM",
    "LPFSGD",
    "MSAM",
    "RST",
    "SAM",
    "SSAMD",
    "SSAMF",
    "SWA",
    "SWAD",
    "WASAM",
    "AELookSAM",
    "Adapter",
    "BitMask",
    "FlatLoRA",
    "Indexed",
    "LoRASAM",
    "LogitArchive",
    "LookLayerSAM",
    "LookSAM",
    "MESALoss",
    "NotBuiltError",
    "RunFolder",
    "SAFLoss",
    "SAMk",
    "SampleLosses",
    "SharpnessAware",
    "backends",
    "fisher",
    "frozen_running_stats",
    "history",
    "info",
    "landscape",
    "ops",
    "optim",
    "report",
    "reporting",
    "sharpness",
    "update_bn",
    "use_backend",
]
