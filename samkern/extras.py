"""Packages that samkern can do without: asked for when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, purpose: str, extra: str = "report") -> Any:
    """The module, imported.

    Raises:
        ModuleNotFoundError: it is not installed; says for what it is needed and how it is installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, and misses something itself
        message = f"{package} is not installed, {purpose} need it: pip install {package}, or samkern[{extra}]"
        raise ModuleNotFoundError(message, name=package) from None
