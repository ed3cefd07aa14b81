"""The engine, its choices, and the named methods, which are compositions of them."""

from .engine import SharpnessAware
from .looksam import LookLayerSAM, LookSAM
from .perturbation import Adaptive, Elementwise, Euclidean, Filterwise, Layerwise, Perturbation
from .record import StepRecord
from .reuse import OrthogonalPart, Reuse
from .sam import ASAM, SAM, SAMk
from .schedule import Always, EveryK, Schedule

__all__ = [
    "ASAM",
    "SAM",
    "Adaptive",
    "Always",
    "Elementwise",
    "Euclidean",
    "EveryK",
    "Filterwise",
    "Layerwise",
    "LookLayerSAM",
    "LookSAM",
    "OrthogonalPart",
    "Perturbation",
    "Reuse",
    "SAMk",
    "Schedule",
    "SharpnessAware",
    "StepRecord",
]
