"""Loss landscapes: what the loss looks like along lines and planes in the space of weights."""

from .result import Landscape

__all__ = ["Landscape"]
