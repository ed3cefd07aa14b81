"""A landscape that has been computed, or a part of it, in memory and as a file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..extras import needed

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[numpy.float64]

KINDS = ("interpolation", "line", "surface", "plane", "trajectory")


@dataclass(frozen=True)
class Landscape:
    """Losses on a line or a grid of points.

    ``loss``: float64 of shape (n,) over ``a``, or (n, m) over ``a`` and ``b``: ``loss[i, j]`` is at ``(a[i], b[j])``, so
    that contour plots need its transpose. NaN: not computed yet, or the loss itself is. ``accuracy``: the same in per
    cent. ``path``: a trajectory in the plane, of shape (steps, 2), or the points that span it. ``labels``: of the axes.

    >>> import numpy as np
    >>> line = samkern.landscape.Landscape("line", "SGD", np.linspace(-1, 1, 3), loss=np.array([2.0, 0.5, 1.0]))
    >>> path = line.save("line.npz")
    >>> samkern.landscape.Landscape.load(path).loss
    array([2. , 0.5, 1. ])
    """

    kind: str
    title: str
    a: Array
    b: Array | None = None
    loss: Array | None = None
    accuracy: Array | None = None
    path: Array | None = None
    labels: tuple[str, str] = ("a", "b")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes an npz file and returns its path. An interrupt leaves the old file or the new one."""
        path, np = Path(path), needed("numpy", "landscapes")
        content = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **content)
        unfinished.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Reads what ``save`` wrote."""
        with needed("numpy", "landscapes").load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        labels = content.pop("labels")
        return cls(
            kind=str(content.pop("kind")),
            title=str(content.pop("title")),
            labels=(str(labels[0]), str(labels[1])),
            **content,
        )
