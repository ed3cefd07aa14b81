"""Runs side by side: which are seeds of one method, their means and spreads, the best, and the front of accuracy and cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ..sharpness import Measurement
from .reading import Run


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of ``n`` finite values; the latter is 0 for one."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Of those that are there and finite, if there are any."""
        there = [value for value in values if is_number(value)]
        if not there:
            return None
        return cls(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else 0.0, len(there))


@dataclass(frozen=True)
class Group:
    """The runs of one method with equal settings. ``label``: the method, with the settings in which it has several."""

    label: str
    runs: tuple[Run, ...]

    def over_seeds(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Of a number that a run has."""
        return Spread.of(map(value, self.runs))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by method and settings, in the order of the first of each."""
    by_method: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        key = repr(sorted((name, repr(value)) for name, value in run.settings.items()))
        by_method.setdefault(run.method, {}).setdefault(key, []).append(run)
    groups = []
    for method, variants in by_method.items():
        differ = _differing([variant[0].settings for variant in variants.values()])
        for variant in variants.values():
            shown = ", ".join(f"{name} {variant[0].settings.get(name)}" for name in differ)
            groups.append(Group(f"{method} ({shown})" if shown else method, tuple(variant)))
    order = {id(run): i for i, run in enumerate(runs)}
    return sorted(groups, key=lambda g: order[id(g.runs[0])])


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one)
    return [name for name in names if len({repr(one.get(name)) for one in settings}) > 1]


# ---- numbers of a run


def last(run: Run, column: str) -> float | None:
    """What stands in the last epoch that has a number there."""
    return next((row[column] for row in reversed(run.epochs) if row.get(column) is not None), None)


def test_accuracy(run: Run) -> float | None:
    """At the end, in per cent."""
    return last(run, "test_accuracy")


def best_accuracy(run: Run) -> float | None:
    """The highest test accuracy along the run, in per cent."""
    return max((row["test_accuracy"] for row in run.epochs if is_number(row.get("test_accuracy"))), default=None)


def gap(run: Run) -> float | None:
    """Training minus test accuracy at the end, in points."""
    train, test = last(run, "train_accuracy"), test_accuracy(run)
    return train - test if train is not None and test is not None else None


def pairs(run: Run) -> float | None:
    """Forward-backward pairs in all."""
    found = last(run, "pairs")
    return run.steps[-1].get("evaluations") if found is None and run.steps else found


def steps(run: Run) -> float | None:
    """Steps in all."""
    found = last(run, "steps")
    return run.steps[-1]["step"] + 1 if found is None and run.steps else found


def pairs_per_step(run: Run) -> float | None:
    """What a step costs on average."""
    n_pairs, n_steps = pairs(run), steps(run)
    return n_pairs / n_steps if n_pairs and n_steps else None


def skipped(run: Run) -> int:
    """Steps that were skipped, of those on record."""
    return sum(row.get("skipped") == 1 for row in run.steps)


# ---- the table


@dataclass(frozen=True)
class Column:
    """``best``: whether the highest (1) or the lowest (-1) is the best, or neither (0). ``text``: a number as it is shown."""

    name: str
    explained: str
    value: Callable[[Run], float | None]
    best: int
    text: Callable[[float], str]


def duration(seconds: float) -> str:
    """For people.

    >>> from samkern.reporting.comparison import duration
    >>> duration(7.25), duration(125), duration(9000)
    ('7.2 s', '2 min 05 s', '2 h 30 min')
    """
    if seconds < 99.95:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _count(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("test %", "Accuracy on test data at the end.", test_accuracy, 1, _percent),
    Column("best %", "Highest test accuracy along the run, which only an early stop would find.", best_accuracy, 1, _percent),
    Column("train %", "Accuracy on training data at the end.", lambda run: last(run, "train_accuracy"), 0, _percent),
    Column("gap", "Training minus test accuracy, in points.", gap, 0, _percent),
    Column("test loss", "Loss on test data at the end.", lambda run: last(run, "test_loss"), -1, lambda x: f"{x:.3f}"),
    Column("pairs", "Forward-backward pairs in all: what the run cost.", pairs, -1, _count),
    Column("time", "Time in training.", lambda run: last(run, "seconds"), -1, duration),
    Column("pairs/step", "Forward-backward pairs that a step takes on average.", pairs_per_step, -1, lambda x: f"{x:.2f}"),
)  # fmt: skip
WITH_SPREAD = ("test %", "best %", "train %", "gap", "test loss")


def table(groups: Sequence[Group]) -> dict[str, Any]:
    """Columns that have any number, and a row for each group: texts, what they are sorted by, and which are the best."""
    spreads = [[group.over_seeds(column.value) for column in COLUMNS] for group in groups]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] is not None for row in spreads)]
    on_front = front(groups)
    best = {}
    for i in shown:
        means = [row[i].mean for row in spreads if row[i] is not None]  # type: ignore[union-attr]
        if COLUMNS[i].best and len(groups) > 1:
            best[i] = max(means) if COLUMNS[i].best > 0 else min(means)
    rows = []
    for place, (one, row) in enumerate(zip(groups, spreads, strict=True)):
        cells = []
        for i in shown:
            found = row[i]
            spread = found is not None and found.n > 1 and COLUMNS[i].name in WITH_SPREAD
            cells.append(
                {
                    "mean": None if found is None else COLUMNS[i].text(found.mean),
                    "sd": COLUMNS[i].text(found.sd) if found is not None and spread else None,
                    "sort": None if found is None else found.mean,
                    "best": found is not None and best.get(i) == found.mean,
                }
            )
        rows.append(
            {"m": place, "label": one.label, "seeds": len(one.runs), "front": place in on_front, "cells": cells}
        )
    return {
        "columns": [{"name": COLUMNS[i].name, "explained": COLUMNS[i].explained} for i in shown],
        "rows": rows,
        "has_front": bool(on_front),
    }


def reached(one: Group) -> tuple[float, float] | None:
    """Mean cost in pairs and mean test accuracy, where both are known."""
    cost, test = one.over_seeds(pairs), one.over_seeds(test_accuracy)
    return (cost.mean, test.mean) if cost is not None and test is not None else None


def front(groups: Sequence[Group]) -> list[int]:
    """Places of the groups that no other beats: more accurate with as few pairs, or as accurate with fewer."""
    points = [reached(one) for one in groups]

    def beaten(i: int) -> bool:
        mine = points[i]
        return mine is None or any(
            other is not None and other[0] <= mine[0] and other[1] >= mine[1] and other != mine for other in points
        )

    return [i for i in range(len(groups)) if not beaten(i)]


def highlights(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A few facts to begin with: the most accurate, what is nearly as good for less, the flattest."""
    facts = []
    known = [(i, one, test) for i, one in enumerate(groups) if (test := one.over_seeds(test_accuracy)) is not None]
    if known:
        i, one, test = max(known, key=lambda entry: entry[2].mean)
        text = f"{test.mean:.2f}" + (f" ± {test.sd:.2f}" if test.n > 1 else "")
        facts.append({"m": i, "what": "Most accurate", "value": f"{text} %", "who": one.label})
        points = [(j, other, at) for j, other in enumerate(groups) if (at := reached(other)) is not None]
        near = [entry for entry in points if entry[2][1] >= test.mean - 1]
        if near and len(groups) > 1:
            j, other, at = min(near, key=lambda entry: (entry[2][0], -entry[2][1]))
            per_step = other.over_seeds(pairs_per_step)
            value = f"{per_step.mean:.2f} pairs a step" if per_step else f"{at[0]:,.0f} pairs"
            facts.append({"m": j, "what": "Cheapest within one point", "value": value, "who": other.label})
    for name in measure_names(groups)[:1]:
        flat = [(i, one, m) for i, one in enumerate(groups) if (m := measured(one, name)) and is_number(m.value)]
        if len(flat) > 1:
            i, one, m = min(flat, key=lambda entry: entry[2].value)
            facts.append({"m": i, "what": f"Lowest {name}", "value": f"{m.value:.4g}", "who": one.label})
    return facts


# ---- measures


def measure_names(groups: Sequence[Group]) -> list[str]:
    """Of all runs, in the order in which they come."""
    return list(dict.fromkeys(name for one in groups for run in one.runs for name in run.measures))


def measured(one: Group, name: str) -> Measurement | None:
    """A measure over the seeds: their mean with its standard error, which has that of each in it; of one seed its own."""
    found = [run.measures[name] for run in one.runs if name in run.measures]
    if len(found) <= 1:
        return found[0] if found else None
    finite = [m.value for m in found if math.isfinite(m.value)]
    return Measurement.mean(finite) if finite else Measurement(math.nan, math.nan)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b: 1 where both rise together, -1 where one falls as the other rises.

    >>> from samkern.reporting.comparison import rank_correlation
    >>> rank_correlation([1, 2, 3], [9, 5, 2])
    -1.0
    """
    score, x_untied, y_untied = 0, 0, 0
    for i in range(len(x)):
        for j in range(i):
            dx, dy = _sign(x[i] - x[j]), _sign(y[i] - y[j])
            score, x_untied, y_untied = score + dx * dy, x_untied + abs(dx), y_untied + abs(dy)
    return score / math.sqrt(x_untied * y_untied) if x_untied and y_untied else None


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
