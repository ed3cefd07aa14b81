"""What the training study leaves: a CSV with a row per epoch and run, and a table of the runs against SGD."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import samkern
from samkern import RunFolder

from . import harness

BAR = 0.03  # time per step may be this much above the method's number of pairs, in units of SGD's step


class StudyError(Exception):
    """The study cannot go on. The text says why, and what to do."""


@dataclass(frozen=True)
class Row:
    """An epoch of a run, as it goes into the CSV.

    Losses and ``train_accuracy`` are means over the training batches as they were seen, augmented, while the weights moved;
    accuracies in per cent; ``gap``: training minus test accuracy. ``seconds``: spent in training so far, without tests and
    checkpoints. ``pairs``: forward-backward pairs so far. ``own_share``: of a step, outside of the pairs.
    """

    method: str
    options: str
    seed: int
    epoch: int
    epochs: int
    images: int
    batch: int
    width: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float
    gap: float
    seconds: float
    pairs: int
    ms_per_step: float
    own_share: float
    backend: str
    compiled: bool
    device: str
    torch: str
    samkern: str
    commit: str
    time: str


def facts(device: torch.device, backend: str, compiled: bool) -> dict[str, Any]:
    """The columns that tell where a row is from."""
    return {
        "backend": backend,
        "compiled": compiled,
        "device": device_name(device),
        "torch": str(torch.__version__),  # a subclass of str, which checkpoints do not take
        "samkern": samkern.__version__,
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def device_name(device: torch.device) -> str:
    """The GPU or the processor, as a folder name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    return harness.device_name()


def commit() -> str:
    """The source's commit; where it is not a git checkout, the commit that the extension was built from."""
    root = Path(__file__).parent.parent
    try:
        asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        build = root / "samkern" / "_build.json"
        return json.loads(build.read_text()).get("commit", "unknown") if build.exists() else "unknown"


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds the rows that the CSV does not have yet: a run that goes on brings its earlier ones, which may be missing.

    Raises:
        StudyError: the CSV is of another version. It is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f.name for f in fields(Row)]
    with path.open("a+", newline="") as file:
        file.seek(0)
        reader = csv.DictReader(file)
        there = [tuple(row.values()) for row in reader]
        if reader.fieldnames not in (None, names):
            raise StudyError(f"{path} has other columns than this version writes; move it away")
        writer = csv.DictWriter(file, names)
        if reader.fieldnames is None:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            if tuple(map(str, values.values())) not in there:
                writer.writerow(values)


def note(folder: RunFolder, rows: Sequence[Row]) -> None:
    """Writes epochs to the run's folder."""
    for row in rows:
        folder.epoch(
            row.epoch,
            steps=row.epoch * (row.images // row.batch),
            pairs=row.pairs,
            seconds=row.seconds,
            train_loss=row.train_loss,
            train_accuracy=row.train_accuracy,
            test_accuracy=row.test_accuracy,
        )


def line(row: Row) -> str:
    """An epoch in a line for the terminal."""
    return (
        f"{row.method} {row.options}".ljust(24)
        + f" seed {row.seed}  epoch {row.epoch:>3}/{row.epochs}  loss {row.train_loss:.3f}"
        + f"  train {row.train_accuracy:5.2f} %  test {row.test_accuracy:5.2f} %  pairs {row.pairs:>6}"
        + f"  {row.seconds:7.1f} s  {row.ms_per_step:8.3f} ms/step  own {100 * row.own_share:4.1f} %"
    )


@dataclass(frozen=True)
class Cost:
    """What a step of a method takes, over all epochs of its runs but the first, which also warms up."""

    ms_per_step: float
    own_share: float
    pairs_per_step: float


def cost(runs: Sequence[Sequence[Row]]) -> Cost:
    """The cost from the rows of a method's runs."""
    warm = [row for run in runs for row in (run[1:] or run)]
    first_pairs = [run[0].pairs if run[1:] else 0 for run in runs]
    n_steps = sum(row.images // row.batch for row in warm)
    n_pairs = sum(run[-1].pairs - before for run, before in zip(runs, first_pairs, strict=True))
    return Cost(
        statistics.fmean(row.ms_per_step for row in warm),
        statistics.fmean(row.own_share for row in warm),
        n_pairs / n_steps,
    )


def table(runs: Sequence[Sequence[Row]]) -> str:
    """Runs as text, one line per method and options, with means over seeds; times are compared with the first SGD."""
    by_method: dict[tuple[str, str], list[Sequence[Row]]] = {}
    for run in runs:
        by_method.setdefault((run[-1].method, run[-1].options), []).append(run)
    sgd = next((cost(group) for (method, _), group in by_method.items() if method == "sgd"), None)
    lines = [("method", "test %", "gap %", "pairs/step", "ms/step", "own share", "time/step", "against pairs", "")]
    for (method, options), group in by_method.items():
        last, spent = [run[-1] for run in group], cost(group)
        test = [row.test_accuracy for row in last]
        spread = f" +- {statistics.stdev(test):.2f}" if len(test) > 1 else ""
        ratio = over = verdict = "-"
        if sgd is not None:
            factor = spent.ms_per_step / sgd.ms_per_step
            excess = factor / spent.pairs_per_step - 1
            ratio, over = f"{factor:.3f} x", f"{100 * excess:+.1f} %"
            verdict = "within the bar" if excess <= BAR else "over the bar"
        lines.append(
            (
                f"{method} {options}".strip(),
                f"{statistics.fmean(test):.2f}{spread}",
                f"{statistics.fmean(row.gap for row in last):.2f}",
                f"{spent.pairs_per_step:.3f}",
                f"{spent.ms_per_step:.3f}",
                f"{100 * spent.own_share:.1f} %",
                ratio,
                over,
                "" if method == "sgd" else verdict,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in lines
    ]
    row = runs[0][-1]
    backends = ", ".join(sorted({run[-1].backend for run in runs} - {"torch"})) or "none"
    title = (
        f"CIFAR-10, {row.images:,} images, {row.epochs} epochs, batch {row.batch}, ResNet-18 of width {row.width}; "
        f"{row.device}, backend {backends}, torch {row.torch}{', compiled' if row.compiled else ''}"
    )
    notes = [
        "gap: training accuracy, on augmented batches as seen, minus test accuracy.",
        "time/step: of opt.step(closure), in units of SGD's. The bar: at most 3 % above the number of pairs, which is",
        "2 for SAM and 1 + 1/k for a method that looks every k-th step. own share: of a step, outside of the pairs.",
    ]
    return "\n".join(
        [title, "", text[0].rstrip(), "-" * len(text[0]), *(part.rstrip() for part in text[1:]), "", *notes]
    )
