"""Run folders, as they are written: a run on record, with what the steps did, how the epochs went, and what was measured."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from ..backends import resolve
from ..files import replacing
from ..history import History
from ..landscape import Landscape
from ..optim import SharpnessAware
from ..sharpness import Measurement

FACTS, STEPS, EPOCHS, MEASURES, LANDSCAPES = "run.json", "steps.csv", "epochs.csv", "measures.json", "landscapes"
EPOCH_COLUMNS = (
    "epoch",
    "steps",
    "pairs",
    "seconds",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
)


class RunFolder:
    """A folder that one training run is written to, for ``samkern.report``.

    ``run.json`` has what the run is, and where it ran; ``steps.csv`` what its steps did; ``epochs.csv`` how it went;
    ``measures.json`` how flat it ended; ``landscapes/*.npz`` what the loss looks like there. Each file is there as a whole
    or not at all, whenever the run is killed, but for the last row of ``steps.csv``, and each may be missing.

    A run that is resumed goes on in its folder: what is trained again replaces what was written of it.

    Args:
        path: of the folder. It is made, with its parents.
        method: what is compared: runs of one method and of equal settings are its seeds. By default the folder's name.
        seed: an integer, or ``None``.
        settings: other options of the run: numbers, texts, booleans, lists and mappings of them.
        device: that it trains on: a torch device or its name.
        resume: whether a run that is there is continued, or removed.
        commit: of the code that trains. By default that of the git repository of the working directory, if it is in one.

    Raises:
        ValueError: the run that is to be continued is of another method or seed.

    >>> model = torch.nn.Linear(2, 1)
    >>> opt = samkern.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    >>> run = samkern.RunFolder("runs/sam-seed0", method="SAM", seed=0, settings={"rho": 0.05})
    >>> with run.history(opt) as history:
    ...     for epoch in range(1, 4):
    ...         loss = opt.step(lambda: (opt.zero_grad(), model(torch.ones(4, 2)).square().mean().backward())[0])
    ...         history.record()
    ...         run.epoch(epoch, pairs=opt.evaluations, test_accuracy=50.0 + epoch)
    >>> run.measure("top eigenvalue", samkern.sharpness.Measurement(8.0, standard_error=0.5))
    >>> sorted(path.name for path in run.path.iterdir())
    ['epochs.csv', 'measures.json', 'run.json', 'steps.csv']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        method: str | None = None,
        seed: int | None = None,
        settings: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        resume: bool = True,
        commit: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            self._remove()
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        facts: dict[str, Any] = {
            "name": self.path.absolute().name,
            "method": self.path.absolute().name if method is None else method,
            "seed": seed,
            "settings": dict(settings or {}),
            "environment": environment(torch.device(device), commit),
            "started": now,
            "resumed": [],
        }
        before = read_json(self.path / FACTS) if (self.path / FACTS).exists() else None
        if isinstance(before, dict):
            for name in ("method", "seed"):
                if before.get(name) != facts[name]:
                    raise ValueError(
                        f"{name} must be {before.get(name)!r}, that of the run in {str(self.path)!r}, got {facts[name]!r}: "
                        "give another folder, or resume=False to remove that run"
                    )
            facts["started"] = before.get("started", now)
            facts["resumed"] = [*before.get("resumed", []), now]
        self._epochs: dict[int, dict[str, Any]] = {}
        for row in read_table(self.path / EPOCHS) if (self.path / EPOCHS).exists() else []:
            self._epochs[int(row["epoch"])] = row
        self._measures = read_json(self.path / MEASURES) if (self.path / MEASURES).exists() else {}
        write_json(self.path / FACTS, facts)

    def history(self, optimizer: SharpnessAware, flush_every: int = 100) -> History:
        """A ``samkern.history.History`` that writes to ``steps.csv``. Steps from ``optimizer.steps`` on, which a run that
        goes on from a checkpoint takes again, are taken out first.
        """
        path = self.path / STEPS
        if path.exists() and isinstance(optimizer, SharpnessAware):
            _keep_steps(path, optimizer.steps)
        return History(optimizer, path, flush_every)

    def epoch(
        self,
        epoch: int,
        *,
        steps: int | None = None,
        pairs: int | None = None,
        seconds: float | None = None,
        train_loss: float | None = None,
        train_accuracy: float | None = None,
        test_loss: float | None = None,
        test_accuracy: float | None = None,
        **scalars: float | None,
    ) -> None:
        """Notes how the run stands after an epoch. Its row is replaced if it is there, and rows of later epochs go: they are
        of a training that was taken back.

        Args:
            epoch: from 1, or from 0 for the start.
            steps, pairs, seconds: steps, forward-backward pairs and time in training, so far.
            train_loss, test_loss: means over samples.
            train_accuracy, test_accuracy: in per cent.
            scalars: numbers of your own, which become columns. Tensors of one entry are numbers here, ``None`` is none.

        Raises:
            TypeError: one of them is no number.
        """
        known = (epoch, steps, pairs, seconds, train_loss, train_accuracy, test_loss, test_accuracy)
        values = {**dict(zip(EPOCH_COLUMNS, known, strict=True)), **scalars}
        row = {name: None if value is None else number(name, value) for name, value in values.items()}
        self._epochs = {i: there for i, there in self._epochs.items() if i < epoch}
        self._epochs[epoch] = row
        names = dict.fromkeys([*EPOCH_COLUMNS, *(name for there in self._epochs.values() for name in there)])
        text = io.StringIO()
        table = csv.DictWriter(text, list(names), lineterminator="\n")
        table.writeheader()
        table.writerows(self._epochs.values())
        write_text(self.path / EPOCHS, text.getvalue())

    def measure(self, name: str, value: Measurement | float) -> None:
        """Notes a measure of flatness, or any other number that stands at the end. It replaces one of the same name."""
        self.measures({name: value})

    def measures(self, values: Mapping[str, Measurement | float]) -> None:
        """Notes several at once."""
        for name, value in values.items():
            found = value if isinstance(value, Measurement) else Measurement(float(number(name, value)))
            self._measures[name] = {
                "value": found.value,
                "standard_error": found.standard_error,
                "parts": list(found.parts),
            }
        write_json(self.path / MEASURES, self._measures)

    def landscape(self, landscape: Landscape, name: str | None = None) -> Path:
        """Keeps a landscape as ``landscapes/<name>.npz`` and returns that path. ``name``: by default of its kind and title."""
        folder = self.path / LANDSCAPES
        folder.mkdir(exist_ok=True)
        return landscape.save(folder / f"{slug(name or f'{landscape.kind} {landscape.title}')}.npz")

    def _remove(self) -> None:
        """Removes the files that a run folder has, and no others."""
        for name in (FACTS, STEPS, EPOCHS, MEASURES):
            (self.path / name).unlink(missing_ok=True)
        for path in (self.path / LANDSCAPES).glob("*.npz"):
            path.unlink()


def slug(name: str) -> str:
    """``name`` as a part of a path: lower case, with dashes for what is neither letter, digit nor dot.

    >>> samkern.reporting.slug("LookSAM (k 5, rho 0.2)")
    'looksam-k-5-rho-0.2'
    """
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "run"


def number(name: str, value: Any) -> int | float:
    """A number of Python, NumPy or torch (a tensor of one entry) as Python's own."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{name} must be a real number or tensor of one entry, got {value!r}")


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """What a run depends on besides its settings."""
    from .. import __version__

    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return {
        "samkern": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "backend": resolve(device),
        "commit": _commit() if commit is None else commit,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _keep_steps(path: Path, n_steps: int) -> None:
    """Takes rows of later steps out of a history, and a last one that is cut short."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = lines[:1]
    for line in lines[1:]:
        step = line.partition(",")[0]
        if line.endswith("\n") and not (step.isdigit() and int(step) >= n_steps):
            kept.append(line)
    if kept != lines:
        # Without a row the columns are anybody's again.
        write_text(path, "".join(kept) if len(kept) > 1 else "")


# ---- files


def write_text(path: Path, text: str) -> Path:
    """Writes beside ``path`` and renames when it is complete; two processes do not meet in one file."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_json(path: Path, content: Any) -> None:
    """JSON has no NaN and no infinity: they become texts, which ``float`` takes back."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file has."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV file of numbers and texts; what is left empty is ``None``, a last row that is cut short is left out."""
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [{name: _read(value) for name, value in row.items() if name is not None} for row in rows]


def _read(text: Any) -> Any:
    if not isinstance(text, str) or text == "":
        return None
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    return str(value)
