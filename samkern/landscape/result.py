"""A landscape that has been computed, or a part of it, in memory and as a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..extras import needed
from ..files import replacing

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[numpy.float64]


@dataclass(frozen=True)
class Landscape:
    """Losses on a line or a grid of points.

    ``loss``: float64 of shape (n,) over ``a``, or (n, m) over ``a`` and ``b``: ``loss[i, j]`` is at ``(a[i], b[j])``, so
    that contour plots need its transpose. NaN: not computed yet, or the loss itself is. ``accuracy``: the same in per
    cent. ``path``: a trajectory in the plane, of shape (steps, 2), or the points that span it. ``labels``: of the axes.
    ``path_loss``, ``path_accuracy``: at the points of ``path``, which lie between those of the grid.

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
    path_loss: Array | None = None
    path_accuracy: Array | None = None

    @property
    def barrier(self) -> float:
        """Of an interpolation: its highest loss above the higher of its ends, 0 if it is an end. NaN: not all is computed.

        Raises:
            ValueError: it is no interpolation.

        >>> import numpy as np
        >>> both = samkern.landscape.Landscape("interpolation", "", np.linspace(0, 1, 3), loss=np.array([1.0, 5.0, 2.0]))
        >>> both.barrier
        3.0
        """
        if self.kind != "interpolation" or self.loss is None:
            raise ValueError(f"only an interpolation that was computed has a barrier, got {self.kind!r}")
        return float(self.loss.max() - max(self.loss[0], self.loss[-1]))

    def figure(self, view: str | None = None, **options: Any) -> Figure:
        """A matplotlib figure: ``samkern.landscape.figure`` of this landscape."""
        from .figures import figure

        return figure(self, view=view, **options)

    def html(self, path: str | os.PathLike[str]) -> Path:
        """Writes an interactive page that needs nothing but itself, about 5 MB, and returns its path."""
        from .interactive import write_page

        return write_page(self, path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes an npz file and returns its path. An interrupt leaves the old file or the new one."""
        return write(self, path, {})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Landscape:
        """Reads what ``save`` wrote, or what a landscape with ``file=`` has so far.

        Raises:
            ValueError: the file is something else, or damaged.
            OSError: it cannot be opened.
        """
        found = read(path, "path")
        content = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        labels = content.pop("labels")
        return cls(
            kind=str(content.pop("kind")),
            title=str(content.pop("title")),
            labels=(str(labels[0]), str(labels[1])),
            **content,
        )


def write(landscape: Landscape, path: str | os.PathLike[str], more: Mapping[str, Any]) -> Path:
    """Saves a landscape, and beside it what is needed to go on with it."""
    path, np = Path(path), needed("numpy", "landscapes")
    content = {f.name: getattr(landscape, f.name) for f in fields(landscape) if getattr(landscape, f.name) is not None}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **content, **more)
    return path


def read(path: str | os.PathLike[str], argument: str) -> dict[str, Any]:
    """The arrays that ``write`` wrote.

    Raises:
        ValueError: the file is something else, or damaged; ``argument`` is the name of ``path``.
        OSError: it cannot be opened.
    """
    np = needed("numpy", "landscapes")
    reason: Exception | None = None
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                content = {name: arrays[name] for name in arrays.files}
        except Exception as error:  # zip, zlib and numpy have a dozen for a damaged file
            content, reason = {}, error
    if not {"kind", "title", "a", "labels"} <= set(content):
        raise ValueError(f"{argument}={str(path)!r} is no landscape that can be read: give another name") from reason
    return content
