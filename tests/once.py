"""One at a time, also in tests that are spread over processes: what many need is made once, what needs the machine waits."""

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


def alone(name: str) -> FileLock:
    """Within the block no other process of these tests is in a block of this name."""
    return FileLock(folder() / f"{name}.lock")


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The file that ``make`` writes to the path it is given. Whoever asks first makes it; the others wait."""
    path = folder() / name
    with alone(name):
        if not path.exists():
            unfinished = path.with_name(f"unfinished-{name}")
            make(unfinished)
            unfinished.rename(path)  # whole or not there
    return path
