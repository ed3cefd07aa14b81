"""The engine, its choices, and the named methods, which are compositions of them."""

from .aesam import AESAM, AELookSAM
from .arsam import ARSAM
from .budget import Budget
from .engine import SharpnessAware
from .lets import LETSASAM, LETSSAM
from .looksam import LookLayerSAM, LookSAM
from .mask import DynamicMask, FisherMask, Mask
from .memory import Memory
from .msam import MSAM
from .perturbation import Adaptive, Elementwise, Euclidean, Filterwise, Layerwise, Momentum, Perturbation
from .radius import LearnedRadius
from .record import StepRecord
from .reuse import Blend, Difference, Looking, OrthogonalPart, Reuse
from .rst import GRST, RST
from .sam import ASAM, SAM, SAMk
from .schedule import Always, Bernoulli, Decision, EveryK, GradientNorm, Now, Outcome, Schedule
from .ssam import SSAMD, SSAMF

__all__ = [
    "AESAM",
    "ARSAM",
    "ASAM",
    "GRST",
    "LETSASAM",
    "LETSSAM",
    "MSAM",
    "RST",
    "SAM",
    "SSAMD",
    "SSAMF",
    "AELookSAM",
    "Adaptive",
    "Always",
    "Bernoulli",
    "Blend",
    "Budget",
    "Decision",
    "Difference",
    "DynamicMask",
    "Elementwise",
    "Euclidean",
    "EveryK",
    "Filterwise",
    "FisherMask",
    "GradientNorm",
    "Layerwise",
    "LearnedRadius",
    "LookLayerSAM",
    "LookSAM",
    "Looking",
    "Mask",
    "Memory",
    "Momentum",
    "Now",
    "OrthogonalPart",
    "Outcome",
    "Perturbation",
    "Reuse",
    "SAMk",
    "Schedule",
    "SharpnessAware",
    "StepRecord",
]
