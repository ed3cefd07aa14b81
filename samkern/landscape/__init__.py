"""Loss landscapes: what the loss looks like along lines and planes in the space of weights."""

from .around import line, surface
from .between import interpolate, plane, trajectory
from .directions import random_directions
from .figures import figure
from .interactive import plotly_figure
from .result import Landscape

__all__ = [
    "Landscape",
    "figure",
    "interpolate",
    "line",
    "plane",
    "plotly_figure",
    "random_directions",
    "surface",
    "trajectory",
]
