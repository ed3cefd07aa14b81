"""``python -m samkern report``: one page that compares runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from .board import to_tensorboard
from .page import report
from .reading import NoRunsError, UnreadableRunError


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, event files if they are asked for, and prints where they are. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m samkern report",
        description="Writes one HTML page that compares training runs. It needs no network.",
    )
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, or folders with such below")
    parser.add_argument("--out", type=Path, help="the page (report.html in the first folder)")
    parser.add_argument("--title", help="its heading")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="event files for TensorBoard too, in this folder"
    )
    options = parser.parse_args(arguments)
    try:
        if options.tensorboard is not None:
            to_tensorboard(options.folders, options.tensorboard)
        path = report(options.folders, options.out, options.title)
    except (NoRunsError, UnreadableRunError, ModuleNotFoundError, OSError) as error:
        raise SystemExit(str(error)) from None
    if options.tensorboard is not None:
        print(f"for TensorBoard: tensorboard --logdir {options.tensorboard}")
    print(path)
    return 0
