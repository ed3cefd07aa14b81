"""The engine, its choices, and the named methods, which are compositions of them."""

from .aesam import AESAM, AELookSAM
from .engine import SharpnessAware
from .looksam import LookLayerSAM, LookSAM
from .mask import DynamicMask, FisherMask, Mask
from .perturbation import Adaptive, Elementwise, Euclidean, Filterwise, Layerwise, Perturbation
from .record import StepRecord
from .reuse import OrthogonalPart, Reuse
from .rst import RST
from .sam import ASAM, SAM, SAMk
from .schedule import Always, Bernoulli, Decision, EveryK, GradientNorm, Now, Schedule
from .ssam import SSAMD, SSAMF

__all__ = [
    "AESAM",
    "ASAM",
    "RST",
    "SAM",
    "SSAMD",
    "SSAMF",
    "AELookSAM",
    "Adaptive",
    "Always",
    "Bernoulli",
    "Decision",
    "DynamicMask",
    "Elementwise",
    "Euclidean",
    "EveryK",
    "Filterwise",
    "FisherMask",
    "GradientNorm",
    "Layerwise",
    "LookLayerSAM",
    "LookSAM",
    "Mask",
    "Now",
    "OrthogonalPart",
    "Perturbation",
    "Reuse",
    "SAMk",
    "Schedule",
    "SharpnessAware",
    "StepRecord",
]
