"""Runs for TensorBoard."""

from __future__ import annotations

import os
from pathlib import Path

from ..extras import needed
from ..history import COLUMNS
from .comparison import is_number
from .page import shown
from .reading import Folders, Run, read_runs
from .runs import slug

SUFFIX = ".samkern"
LEVELS = {"plain": 0, "reuse": 1, "look": 2}


def to_tensorboard(folders: Folders, out: str | os.PathLike[str]) -> list[Path]:
    """Writes event files for TensorBoard, a folder for each run below ``out``, and returns those folders.

    Scalars are ``samkern/...`` and numbers of your own by step, as ``samkern.history.History`` writes them, ``epoch/...`` by
    epoch and ``measure/...``; settings and environment are a text. A second export replaces the first.

    Raises:
        NoRunsError, UnreadableRunError: as in ``samkern.report``.
        ModuleNotFoundError: tensorboard is not installed.

    >>> samkern.RunFolder("runs/sam-seed0", method="SAM", seed=0).epoch(1, test_accuracy=90.0)
    >>> [path.name for path in samkern.reporting.to_tensorboard("runs", "logs")]
    ['sam-seed0']
    """
    needed("tensorboard", "its event files", extra="dev")
    runs, folders_of, taken = read_runs(folders), [], set()
    for run in runs:
        name, n = slug(run.name), 1
        while name in taken:  # runs of one name in different folders
            n += 1
            name = f"{slug(run.name)}-{n}"
        taken.add(name)
        _write(run, Path(out) / name)
        folders_of.append(Path(out) / name)
    return folders_of


def _write(run: Run, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        old.unlink()
    with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
        for row in run.steps:
            for name, value in row.items():
                number = LEVELS.get(value) if name == "decision" else value
                if name not in ("step", "reason") and isinstance(number, (int, float)):
                    writer.add_scalar(f"samkern/{name}" if name in COLUMNS else name, number, row["step"])
        for row in run.epochs:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    writer.add_scalar(f"epoch/{name}", value, row["epoch"])
        for name, measurement in run.measures.items():
            writer.add_scalar(f"measure/{name}", measurement.value)
            if is_number(measurement.standard_error):
                writer.add_scalar(f"measure/{name} standard error", measurement.standard_error)
        lines = [f"{name}: {shown(value)}" for name, value in {**run.settings, **run.environment}.items()]
        seed = "" if run.seed is None else f", seed {run.seed}"
        writer.add_text("run", "    \n".join([f"{run.method}{seed}", *lines]))
