"""Progress bars, where tqdm is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

BAR_AFTER = 2.0  # seconds


@contextmanager
def progress_bar(n: int | None, what: str, unit: str, progress: bool | None) -> Iterator[Callable[[int], object]]:
    """Yields what is called with the number of units that are done.

    ``n``: units in all, if known. ``progress``: whether to show a bar; ``None``: when it takes longer than two seconds.
    """
    if progress is False:
        yield lambda done: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done: None
        return
    with tqdm(total=n, desc=what, unit=unit, leave=False, delay=0 if progress else BAR_AFTER) as bar:
        yield bar.update
