"""What the study shows: a table for the terminal, a figure, and a JSON of the same."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .study import N_TRAIN, Result, Row

COLUMNS = ("method", "test %", "best %", "train %", "top eigenvalue", "pairs/step", "time/step", "own share")
MARKERS = "osD^v<>PX*"  # methods that cost and reach the same would hide each other


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the latter 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def facts(row: Row, sgd: Row) -> dict[str, Any]:
    """The numbers of a row, as they go into the JSON."""
    test, spread = mean_and_spread([run.test_accuracy for run in row.runs])
    return {
        "method": row.entry.name,
        "test_accuracy": test,
        "test_spread": spread,
        "best_accuracy": statistics.fmean(max(accuracy for _, accuracy in run.curve) for run in row.runs),
        "train_accuracy": statistics.fmean(run.train_accuracy for run in row.runs),
        "top_eigenvalue": statistics.fmean(run.eigenvalue for run in row.runs),
        "pairs_per_step": row.pairs_per_step,
        "time_per_step_ratio": row.seconds_per_step / sgd.seconds_per_step,
        "milliseconds_per_step": row.seconds_per_step * 1e3,
        "own_share": row.own_share,
    }


def table(result: Result) -> str:
    """The rows as text. Time per step is a multiple of SGD's; the own share is the optimizer's part of a step."""
    lines = [COLUMNS]
    for row in result.rows:
        f = facts(row, result.rows[0])
        lines.append(
            (
                f["method"],
                f"{f['test_accuracy']:.1f} +- {f['test_spread']:.1f}",
                f"{f['best_accuracy']:.1f}",
                f"{f['train_accuracy']:.1f}",
                f"{f['top_eigenvalue']:.0f}",
                f"{f['pairs_per_step']:.2f}",
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
        "top eigenvalue: curvature of the training loss in its sharpest direction.",
        "own share: part of a step that is the optimizer's own arithmetic, not forward and backward passes.",
    ]
    return "\n".join([title, "", *text, "", *notes])


def figure(result: Result) -> Figure:
    """Left: final test accuracy against what it cost in pairs. Right: test accuracy along the runs, mean over seeds."""
    chart = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(chart)
    cost, course = chart.subplots(1, 2, sharey=True)
    for i, row in enumerate(result.rows):
        test, spread = mean_and_spread([run.test_accuracy for run in row.runs])
        pairs = row.runs[0].pairs
        color = f"C{i}"
        cost.errorbar(
            pairs, test, spread, fmt=MARKERS[i % len(MARKERS)], mfc="none", color=color, capsize=3, label=row.entry.name
        )
        curves = zip(*(run.curve for run in row.runs), strict=True)
        points = [(step[0][0], statistics.fmean(value for _, value in step)) for step in curves]
        course.plot(*zip(*points, strict=True), color=color, lw=1.4)
    cost.set(xlabel="forward-backward pairs in all", ylabel="test accuracy (%)", title="accuracy against cost")
    cost.set_xlim(left=0)
    course.set(xlabel="forward-backward pairs so far", title="along the run, mean over seeds")
    for axes in (cost, course):
        axes.grid(alpha=0.3)
    chart.legend(loc="outside lower center", ncols=4, frameon=False)
    noise = result.setting.noise * 100
    chart.suptitle(f"Digits with {noise:.0f} % wrong training labels")
    return chart


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
            {**facts(row, result.rows[0]), "runs": [{"seed": run.seed, "curve": run.curve} for run in row.runs]}
            for row in result.rows
        ],
    }
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    return [picture, numbers]
