"""The engine, its choices, and the named methods, which are compositions of them."""

from .engine import SharpnessAware
from .looksam import LookLayerSAM, LookSAM
from .mask import DynamicMask, FisherMask, Mask
from .perturbation import Adaptive, Elementwise, Euclidean, Filterwise, Layerwise, Perturbation
from .record import StepRecord
from .reuse import OrthogonalPart, Reuse
from .sam import ASAM, SAM, SAMk
from .schedule import Always, EveryK, Schedule
from .ssam import SSAMD, SSAMF

__all__ = [
    "ASAM",
    "SAM",
    "SSAMD",
    "SSAMF",
    "Adaptive",
    "Always",
    "DynamicMask",
    "Elementwise",
    "Euclidean",
    "EveryK",
    "Filterwise",
    "FisherMask",
    "Layerwise",
    "LookLayerSAM",
    "LookSAM",
    "Mask",
    "OrthogonalPart",
    "Perturbation",
    "Reuse",
    "SAMk",
    "Schedule",
    "SharpnessAware",
    "StepRecord",
]
