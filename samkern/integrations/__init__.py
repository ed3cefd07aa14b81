"""samkern inside other people's training loops: Lightning, the Trainer of Transformers, Accelerate.

Each is a module of its own, imported by its name, and needs its package: ``pip install samkern[lightning]``,
``samkern[transformers]`` or ``samkern[accelerate]``.
"""

from __future__ import annotations

__all__ = ["MissingPackageError"]


class MissingPackageError(ImportError):
    """The package that an integration is for is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"samkern.integrations.{extra} needs {package}, which is not installed: pip install samkern[{extra}]",
            name=package,
        )
