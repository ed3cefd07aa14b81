"""The engine, its choices, and the named methods, which are compositions of them."""

from .aesam import AESAM, AELookSAM
from .arsam import ARSAM
from .averaging import EMA, SWA
from .bar import BAR
from .budget import Budget
from .companion import Companion, RunningAverage
from .engine import SharpnessAware
from .flatlora import FlatLoRA, MergedNoise
from .lets import LETSASAM, LETSSAM
from .looksam import LookLayerSAM, LookSAM
from .lorasam import LoRASAM
from .lpf import LPFSGD
from .mask import DynamicMask, FisherMask, Mask
from .memory import Memory
from .msam import MSAM
from .perturbation import Adaptive, Elementwise, Euclidean, Filterwise, Gaussian, Layerwise, Momentum, Perturbation
from .radius import LearnedRadius
from .record import StepRecord
from .reuse import Blend, Difference, Looking, OrthogonalPart, Reuse
from .rst import GRST, RST
from .sam import ASAM, SAM, SAMk
from .schedule import Always, Bernoulli, Decision, EveryK, GradientNorm, Now, Outcome, Schedule
from .ssam import SSAMD, SSAMF
from .swad import SWAD
from .wasam import WASAM

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
    "Adaptive",
    "Always",
    "Bernoulli",
    "Blend",
    "Budget",
    "Companion",
    "Decision",
    "Difference",
    "DynamicMask",
    "Elementwise",
    "Euclidean",
    "EveryK",
    "Filterwise",
    "FisherMask",
    "FlatLoRA",
    "Gaussian",
    "GradientNorm",
    "Layerwise",
    "LearnedRadius",
    "LoRASAM",
    "LookLayerSAM",
    "LookSAM",
    "Looking",
    "Mask",
    "Memory",
    "MergedNoise",
    "Momentum",
    "Now",
    "OrthogonalPart",
    "Outcome",
    "Perturbation",
    "Reuse",
    "RunningAverage",
    "SAMk",
    "Schedule",
    "SharpnessAware",
    "StepRecord",
]
