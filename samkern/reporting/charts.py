"""What the charts of the page show, as data: the page's script draws it, in the colours of its reader.

Methods are numbers here, places in the list of groups. Numbers have six digits; ``None`` where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from . import comparison
from .comparison import Group, Spread, is_number
from .reading import Run

Chart = dict[str, Any]
N_BINS = 240  # of steps: more points than a chart has pixels to show
N_WIDE_BINS = 24  # of the share of looks, which would be a saw's teeth in narrow ones
LOG_FROM = 30.0  # largest over smallest value from which on an axis is logarithmic

LEARNING = (
    ("test_accuracy", "Test accuracy", "test accuracy (%)"),
    ("train_accuracy", "Training accuracy", "training accuracy (%)"),
    ("test_loss", "Test loss", "test loss"),
    ("train_loss", "Training loss", "training loss"),
)
STEPS = (
    ("grad_norm", "Gradient norm", "norm of the gradient"),
    ("second_norm", "Gradient norm of the second pass", "norm at the perturbed weights"),
    ("looks", "Looks", "share of steps that look"),
    ("radius", "Radius", "radius of the perturbation"),
    ("lr", "Learning rate", "learning rate"),
)
FROM_ZERO = ("looks", "radius", "lr")  # with an axis from zero, not of logarithms
NOT_DRAWN = {"step", "decision", "evaluations", "perturb_norm", "rate", "skipped", "reason"}
SPENT = (("pairs", "forward-backward pairs so far"), ("seconds", "time in training (s)"))


def digits(value: float | None) -> float | None:
    """Six of them, and no NaN."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def learning(groups: Sequence[Group]) -> list[Chart]:
    """Accuracies, losses and numbers of one's own over the epochs."""
    fixed = {"epoch", "steps", "pairs", "seconds"}
    known = [name for name, *_ in LEARNING]
    own = _columns((run.epochs for one in groups for run in one.runs), fixed | set(known))
    named = [*LEARNING, *((name, name, name) for name in own)]
    charts = [
        lines(groups, title, "epoch", label, partial(_by_epoch, column=name), name) for name, title, label in named
    ]
    return [chart for chart in charts if chart["series"]]


def stepwise(groups: Sequence[Group]) -> list[Chart]:
    """What histories have, over the steps: means of so many of them that the points stay apart."""
    known = [name for name, *_ in STEPS]
    own = _columns((run.steps for one in groups for run in one.runs), NOT_DRAWN | set(known))
    last = max((run.steps[-1]["step"] for one in groups for run in one.runs if run.steps), default=0)
    charts = []
    for name, title, label in [*STEPS, *((name, name, name) for name in own)]:
        width = math.ceil((last + 1) / (N_WIDE_BINS if name == "looks" else N_BINS))
        courses = partial(_by_step, column=name, width=width)
        charts.append(lines(groups, title, "step", label, courses, name))
    return [chart for chart in charts if chart["series"]]


def lines(
    groups: Sequence[Group],
    title: str,
    x: str,
    y: str,
    course: Callable[[Run], dict[float, float | None]],
    name: str,
) -> Chart:
    """Means over the seeds, with a band of a standard deviation on both sides where there are several."""
    series = []
    for m, one in enumerate(groups):
        spreads = _over_seeds([course(run) for run in one.runs])
        if not spreads:
            continue
        line: Chart = {"m": m, "x": [digits(at) for at in spreads], "y": _means(spreads.values())}
        if any(spread.n > 1 for spread in spreads.values()):
            line["sd"] = [digits(spread.sd) for spread in spreads.values()]
        series.append(line)
    values = [value for line in series for value in line["y"]]
    return {
        "kind": "lines",
        "id": name,
        "title": title,
        "x": x,
        "y": y,
        "series": series,
        "log": name not in FROM_ZERO and _logarithmic(values),
        "from_zero": name in FROM_ZERO,
        "range": _end_of_runs(series) if name.endswith("accuracy") else None,
    }


def against_cost(groups: Sequence[Group]) -> list[Chart]:
    """Test accuracy along the runs over pairs and over time, with the end of each method and the front."""
    charts = []
    for column, label in SPENT:
        series, ends = [], []
        for m, one in enumerate(groups):
            spent = _over_seeds([_by_epoch(run, column) for run in one.runs])
            tested = _over_seeds([_by_epoch(run, "test_accuracy") for run in one.runs])
            both = [(spent[epoch], test) for epoch, test in tested.items() if epoch in spent]
            if not both:
                continue
            series.append({"m": m, "x": _means(x for x, _ in both), "y": _means(y for _, y in both)})
            cost = one.over_seeds(partial(comparison.last, column=column))
            test = one.over_seeds(comparison.test_accuracy)
            if cost is not None and test is not None:
                ends.append({"m": m, "x": digits(cost.mean), "y": digits(test.mean), "sd": digits(test.sd)})
        if series:
            charts.append(
                {
                    "kind": "cost",
                    "id": f"accuracy-{column}",
                    "title": "Test accuracy against " + ("pairs" if column == "pairs" else "time"),
                    "x": label,
                    "y": "test accuracy (%)",
                    "series": series,
                    "ends": ends,
                    "front": _front_line(ends),
                    "range": _end_of_runs(series, above=0.14),
                }
            )
    return charts


def flatness(groups: Sequence[Group]) -> list[Chart]:
    """Of each measure: its values by method, and those of single runs against test accuracy."""
    charts = []
    for name in comparison.measure_names(groups):
        dots = []
        for m, one in enumerate(groups):
            found = comparison.measured(one, name)
            if found is not None and math.isfinite(found.value):
                dots.append({"m": m, "x": digits(found.value), "error": digits(found.standard_error) or 0})
        runs = [
            (m, run, run.measures[name], comparison.test_accuracy(run))
            for m, one in enumerate(groups)
            for run in one.runs
            if name in run.measures
        ]
        known = [entry for entry in runs if is_number(entry[2].value) and is_number(entry[3])]
        points = [
            {
                "m": m,
                "x": digits(found.value),
                "y": digits(test),
                "error": digits(found.standard_error) or 0,
                "name": "" if run.seed is None else f"seed {run.seed}",
            }
            for m, run, found, test in known
        ]
        tau = comparison.rank_correlation([k[2].value for k in known], [k[3] or 0.0 for k in known])
        if dots:
            logarithmic = _logarithmic([dot["x"] or 0.0 for dot in dots])
            charts.append({"name": name, "dots": dots, "points": points, "tau": digits(tau), "log": logarithmic})
    return charts


# ---- courses of runs


def _columns(tables: Iterable[Sequence[dict[str, Any]]], without: set[str]) -> list[str]:
    """Names of columns with numbers."""
    rows = [row for table in tables for row in table]
    names = dict.fromkeys(name for row in rows for name in row if name not in without)
    return [name for name in names if any(is_number(row.get(name)) for row in rows)]


def _by_epoch(run: Run, column: str) -> dict[float, float | None]:
    return {row["epoch"]: row.get(column) for row in run.epochs}


def _by_step(run: Run, column: str, width: int) -> dict[float, float | None]:
    """Means over ``width`` steps, at their middle."""
    bins: dict[int, list[float | None]] = {}
    for row in run.steps:
        value = float(row["decision"] == "look") if column == "looks" else row.get(column)
        bins.setdefault(row["step"] // width, []).append(value)
    means = {i: Spread.of(values) for i, values in bins.items()}
    return {i * width + (width - 1) / 2: None if mean is None else mean.mean for i, mean in means.items()}


def _over_seeds(courses: Sequence[dict[float, float | None]]) -> dict[float, Spread]:
    """Where there are numbers: lines go on over epochs that were not tested."""
    places = sorted({at for course in courses for at in course})
    spreads = {at: Spread.of(course.get(at) for course in courses) for at in places}
    return {at: spread for at, spread in spreads.items() if spread is not None}


def _means(spreads: Iterable[Spread]) -> list[float | None]:
    return [digits(spread.mean) for spread in spreads]


def _logarithmic(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_FROM


def _end_of_runs(series: Sequence[Chart], above: float = 0.04) -> list[float] | None:
    """A range without the first tenth of the runs, in which accuracies rise from nothing: there would be no room for the rest.

    ``above``: share of the range that is left free there, for names.
    """
    late = [y for line in series for y in line["y"][len(line["y"]) // 10 :]]
    if not late or max(late) == min(late):
        return None
    height = max(late) - min(late)
    return [round(max(min(late) - 0.04 * height, -2), 3), round(max(late) + above * height, 3)]


def _front_line(ends: Sequence[Chart]) -> list[list[float]]:
    """Points that no other is above and left of, from left to right."""
    kept: list[list[float]] = []
    for end in sorted(ends, key=lambda end: (end["x"], -end["y"])):
        if not kept or end["y"] > kept[-1][1]:
            kept.append([end["x"], end["y"]])
    return kept
