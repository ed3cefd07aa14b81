"""Run folders, and one HTML page that compares the runs in them."""

from .board import to_tensorboard
from .page import report
from .reading import NoRunsError, Run, UnreadableRunError, read_runs
from .runs import RunFolder, slug

__all__ = ["NoRunsError", "Run", "RunFolder", "UnreadableRunError", "read_runs", "report", "slug", "to_tensorboard"]
