"""torch.save that leaves the old file or the whole new one, whenever it is interrupted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def atomic_save(content: Any, path: Path) -> None:
    """Writes ``content`` beside ``path`` and renames it when it is complete; two processes do not meet in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        torch.save(content, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
