"""Run folders, as they are read: what is missing is left out, what cannot be read is named."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..history import COLUMNS
from ..landscape import Landscape
from ..sharpness import Measurement
from .runs import EPOCHS, FACTS, LANDSCAPES, MEASURES, STEPS, read_json, read_table

Folders = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Rows = list[dict[str, Any]]


class NoRunsError(FileNotFoundError):
    """There is no run in the folders. The text says what was looked for."""


class UnreadableRunError(ValueError):
    """A file of a run is not what it should be. The text names it, and says why."""


@dataclass(frozen=True)
class Run:
    """A run as it was found in its folder.

    ``started``: ISO 8601, or empty. ``steps``: rows of its ``History``. ``epochs``: rows by epoch, whose columns
    ``RunFolder.epoch`` explains. ``landscapes``: paths of npz files.

    >>> samkern.RunFolder("runs/sam-seed1", method="SAM", seed=1).epoch(1, test_accuracy=90.0)
    >>> run = samkern.reporting.Run.read("runs/sam-seed1")
    >>> run.method, run.seed, run.epochs[-1]["test_accuracy"]
    ('SAM', 1, 90.0)
    """

    folder: Path
    name: str
    method: str
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    started: str = ""
    steps: Rows = field(default_factory=list)
    epochs: Rows = field(default_factory=list)
    measures: dict[str, Measurement] = field(default_factory=dict)
    landscapes: tuple[Path, ...] = ()

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Run:
        """Reads a run folder, or any folder with the CSV file of a ``History``: its name then tells method and seed.

        Raises:
            NoRunsError: it has no part of a run.
            UnreadableRunError: a file cannot be read.
        """
        folder = Path(folder)
        if not is_run(folder):
            raise NoRunsError(f"no run in {str(folder)!r}: looked for {_LOOKED_FOR}")
        name = folder.absolute().name
        method, seed = _from_name(name)
        facts = _read(folder / FACTS, _facts) if (folder / FACTS).exists() else {}
        history = _history(folder)
        return cls(
            folder=folder,
            name=str(facts.get("name", name)),
            method=str(facts.get("method", method)),
            seed=facts.get("seed", seed),
            settings=facts.get("settings", {}),
            environment={key: value for key, value in facts.get("environment", {}).items() if value is not None},
            started=str(facts.get("started", "")),
            steps=_read(history, read_table) if history else [],
            epochs=_read(folder / EPOCHS, _epochs) if (folder / EPOCHS).exists() else [],
            measures=_read(folder / MEASURES, _measures) if (folder / MEASURES).exists() else {},
            landscapes=tuple(sorted((folder / LANDSCAPES).glob("*.npz"), key=_natural)),
        )

    def load_landscapes(self) -> list[Landscape]:
        """Its landscapes, planes first.

        Raises:
            UnreadableRunError: a file cannot be read.
        """
        found = [_read(path, Landscape.load) for path in self.landscapes]
        return sorted(found, key=lambda landscape: landscape.b is None)


_LOOKED_FOR = f"{FACTS}, {EPOCHS}, or a CSV file of a samkern.history.History"


def read_runs(folders: Folders) -> list[Run]:
    """All runs in these folders and in the folders below, in the order in which they were started.

    Raises:
        NoRunsError: there is none.
        UnreadableRunError: a file of one cannot be read.

    >>> samkern.RunFolder("all/sgd-seed0", method="SGD", seed=0).epoch(1, test_accuracy=80.0)
    >>> [run.method for run in samkern.reporting.read_runs("all")]
    ['SGD']
    """
    asked = [Path(folders)] if isinstance(folders, (str, os.PathLike)) else [Path(folder) for folder in folders]
    if not asked:
        raise ValueError("folders must name at least one folder, got none")
    for folder in asked:
        if not folder.is_dir():
            raise NoRunsError(
                f"folders: {str(folder)!r} is no folder; give the folder of a run, or one with such folders"
            )
    found = {path.resolve(): path for folder in asked for path in _runs_below(folder)}
    if not found:
        places = ", ".join(repr(str(folder)) for folder in asked)
        raise NoRunsError(f"no run in {places} or in folders below: looked for {_LOOKED_FOR}")
    runs = [Run.read(path) for path in found.values()]
    return sorted(runs, key=lambda run: (run.started == "", run.started, _natural(run.folder)))


def is_run(folder: Path) -> bool:
    """Whether there is a part of a run."""
    return (folder / FACTS).is_file() or (folder / EPOCHS).is_file() or _history(folder) is not None


def _runs_below(folder: Path) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    for path in sorted(folder.iterdir(), key=_natural):
        if path.is_dir() and not path.is_symlink():
            yield from _runs_below(path)


def _history(folder: Path) -> Path | None:
    """The run's ``steps.csv``, or else the first CSV file that begins as a history does."""
    if (folder / STEPS).is_file():
        return folder / STEPS
    for path in sorted(folder.glob("*.csv"), key=_natural):
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            if tuple(next(csv.reader([file.readline()]), [])[: len(COLUMNS)]) == COLUMNS:
                return path
    return None


def _from_name(name: str) -> tuple[str, int | None]:
    """Method and seed of a folder that has no ``run.json``: ``sam-seed3`` is seed 3 of ``sam``."""
    match = re.fullmatch(r"(.+?)[-_ ]seed[-_ ]?(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def _natural(path: Path) -> list[Any]:
    """Sorts ``seed10`` after ``seed9``."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    # Whatever a broken file does to those who read it: zipfile, NumPy and json have errors of their own.
    except Exception as error:
        raise UnreadableRunError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}): restore it, or move it away"
        ) from error


def _facts(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise TypeError(f"expected an object, got {type(content).__name__}")
    for name in ("settings", "environment"):
        if not isinstance(content.get(name, {}), dict):
            raise TypeError(f"{name} is no object")
    return content


def _epochs(path: Path) -> Rows:
    rows = read_table(path)
    if any(not isinstance(row.get("epoch"), int) for row in rows):
        raise ValueError("a row has no epoch")
    return sorted(rows, key=lambda row: int(row["epoch"]))


def _measures(path: Path) -> dict[str, Measurement]:
    return {
        name: Measurement(float(found["value"]), float(found.get("standard_error", math.nan)), _parts(found))
        for name, found in read_json(path).items()
    }


def _parts(found: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(part) for part in found.get("parts", ()))
