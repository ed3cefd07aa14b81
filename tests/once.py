"""What takes long to make and many tests need: made once, also by tests that are spread over processes."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

SHARED = "SAMKERN_TESTS_FOLDER"


@functools.cache
def folder() -> Path:
    """Goes when this process ends, or the one that started it and called ``share()``."""
    if SHARED in os.environ:
        return Path(os.environ[SHARED])
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


def share() -> None:
    """Processes that this one starts from now on have one folder."""
    os.environ[SHARED] = str(folder())


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The file that ``make`` writes to the path it is given. Whoever asks first makes it; the others wait."""
    path = folder() / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{name}")
            make(unfinished)
            unfinished.rename(path)  # whole or not there
    return path
