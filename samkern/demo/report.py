"""What the study shows: a table for the terminal, a figure, and a JSON of the same."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .study import N_TRAIN, Result, Row

COLUMNS = ("method", "test %", "best %", "train %", "top eigenvalue", "pairs/step", "front", "time/step", "own share")
MARKERS = "osD^v<>PX*"  # methods that cost and reach the same would hide each other
TICKS = (20, 50, 60, 70, 80, 85, 90, 92, 94, 95, 96, 97, 98, 99)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def reached(row: Row) -> tuple[float, float]:
    """Forward-backward pairs of a run and its final test accuracy, mean over seeds."""
    return statistics.fmean(run.pairs for run in row.runs), statistics.fmean(run.test_accuracy for run in row.runs)


def on_front(row: Row, rows: list[Row]) -> bool:
    """Whether no other row reaches more with as few pairs, or as much with fewer."""
    pairs, test = reached(row)
    others = [reached(other) for other in rows if other is not row]
    return not any(p <= pairs and t >= test and (p, t) != (pairs, test) for p, t in others)


def facts(row: Row, rows: list[Row]) -> dict[str, Any]:
    """The numbers of a row, as they go into the JSON."""
    sgd = rows[0]
    test, spread = mean_and_spread([run.test_accuracy for run in row.runs])
    return {
        "method": row.entry.name,
        "test_accuracy": test,
        "test_spread": spread,
        "best_accuracy": statistics.fmean(max(accuracy for _, accuracy in run.curve) for run in row.runs),
        "train_accuracy": statistics.fmean(run.train_accuracy for run in row.runs),
        "top_eigenvalue": statistics.fmean(run.eigenvalue for run in row.runs),
        "pairs_per_step": row.pairs_per_step,
        "on_front": on_front(row, rows),
        "held_out": row.entry.held_out,
        "time_per_step_ratio": row.seconds_per_step / sgd.seconds_per_step,
        "milliseconds_per_step": row.seconds_per_step * 1e3,
        "own_share": row.own_share,
    }


def table(result: Result) -> str:
    """The rows as text. Time per step is a multiple of SGD's; the own share is the optimizer's part of a step."""
    lines = [COLUMNS]
    for row in result.rows:
        f = facts(row, result.rows)
        lines.append(
            (
                f["method"],
                f"{f['test_accuracy']:.1f} +- {f['test_spread']:.1f}",
                f"{f['best_accuracy']:.1f}",
                f"{f['train_accuracy']:.1f}",
                f"{f['top_eigenvalue']:.0f}",
                f"{f['pairs_per_step']:.2f}",
                "*" if f["on_front"] else "",
                f"{f['time_per_step_ratio']:.2f} x",
                f"{f['own_share'] * 100:.0f} %",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    s = result.setting
    title = (
        f"Handwritten digits, {N_TRAIN} to train, {s.noise * 100:.0f} % of their labels wrong; {s.epochs} epochs, "
        f"{len(s.seeds)} seed{'s' if len(s.seeds) > 1 else ''}; {result.seconds:.0f} s on {torch.get_num_threads()} threads"
    )
    notes = [
        "best %: the highest along the run, which only an early stop on right labels would find.",
        "train %: agreement with the training labels, wrong ones included: high means that they were memorised.",
        "top eigenvalue: curvature of the loss on a third of the training data, in its sharpest direction.",
        "front: no other method reaches more with as few forward-backward pairs in all, or as much with fewer.",
        "own share: part of a step that is the optimizer's own arithmetic, not forward and backward passes.",
    ]
    notes += [
        f"{row.entry.name}: the last {row.entry.held_out} training samples are its validation data; it does not train on them."
        for row in result.rows
        if row.entry.held_out
    ]
    return "\n".join([title, "", *text, "", *notes])


def figure(result: Result) -> Figure:
    """Left: final test accuracy against what it cost in pairs. Right: test accuracy along the runs, mean over seeds.

    Methods that are not on the front are lighter.
    """
    chart = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(chart)
    cost, course = chart.subplots(1, 2)
    rows = result.rows
    colors = [color for name in ("tab10", "Dark2") for color in matplotlib.colormaps[name].colors]  # type: ignore[attr-defined]
    sides = {row.entry.name: i % 2 for i, row in enumerate(sorted(rows, key=reached))}  # labels of neighbours
    for i, row in enumerate(rows):
        (pairs, test), (_, spread) = reached(row), mean_and_spread([run.test_accuracy for run in row.runs])
        front = on_front(row, rows)
        look: dict[str, Any] = {"color": colors[i % len(colors)], "alpha": 1.0 if front else 0.5}
        face = None if front else "none"
        label = f"{i + 1}  {row.entry.name}"
        cost.errorbar(pairs, test, spread, fmt=MARKERS[i % len(MARKERS)], mfc=face, elinewidth=0.7, label=label, **look)
        offset, align = ((6, 2), "left") if sides[row.entry.name] else ((-6, 2), "right")
        cost.annotate(str(i + 1), (pairs, test), offset, textcoords="offset points", ha=align, fontsize=8)
        steps = [zip(*step, strict=True) for step in zip(*(run.curve for run in row.runs), strict=True)]
        course.plot(
            *zip(*([*map(statistics.fmean, step)] for step in steps), strict=True), lw=1.6 if front else 0.9, **look
        )
    front_line = sorted(reached(row) for row in rows if on_front(row, rows))
    cost.plot(*zip(*front_line, strict=True), color="0.5", lw=0.8, ls=":", zorder=0)
    cost.set(xlabel="forward-backward pairs in all", title="accuracy against cost")
    cost.set_xlim(left=0)
    course.set(xlabel="forward-backward pairs so far", title="along the run, mean over seeds")
    for axes in (cost, course):
        _stretch_the_top(axes)
        axes.grid(alpha=0.3)
    chart.legend(*cost.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    noise = result.setting.noise * 100
    chart.suptitle(f"Digits with {noise:.0f} % wrong training labels; filled and bold: on the front")
    return chart


def _stretch_the_top(axes: Axes) -> None:
    """An axis of accuracies on which errors of 2 and 4 % are as far apart as those of 20 and 40 %."""
    low, high = axes.get_ylim()
    axes.set_yscale("function", functions=(lambda a: -np.log(np.maximum(101 - a, 1e-9)), lambda b: 101 - np.exp(-b)))
    axes.set_yticks(TICKS, map(str, TICKS))
    axes.set_ylim(max(low, 0), min(high, 99.7))
    axes.set_ylabel("test accuracy (%)")


def write(result: Result, folder: Path) -> list[Path]:
    """Writes ``demo.png`` and ``demo.json`` into ``folder`` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    picture, numbers = folder / "demo.png", folder / "demo.json"
    figure(result).savefig(picture, dpi=130)
    content = {
        "setting": {
            "noise": result.setting.noise,
            "epochs": result.setting.epochs,
            "seeds": list(result.setting.seeds),
        },
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds": result.seconds,
        "rows": [
            {**facts(row, result.rows), "runs": [{"seed": run.seed, "curve": run.curve} for run in row.runs]}
            for row in result.rows
        ],
    }
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    return [picture, numbers]
