"""Measures of flatness: what sharpness-aware training is meant to lower."""

from .hessian import top_eigenvalue

__all__ = ["top_eigenvalue"]
